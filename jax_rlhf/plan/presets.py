"""Shapes of models that need not be there: presets, config.json files, checkpoints' folders."""

import re
from typing import Any

from jax_rlhf.hub import CheckpointError, describe_pretrained
from jax_rlhf.hub.families import config_from_hub
from jax_rlhf.json_files import JSONFileError, read_object
from jax_rlhf.models import DecoderConfig
from jax_rlhf.names import local_path


def _llama3(**sizes: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 500_000.0}
    return {
        "model_type": "llama",
        "vocab_size": 128_256,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": rope,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **sizes,
    }


def _opt(**sizes: Any) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "vocab_size": 50_272,
        "max_position_embeddings": 2048,
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "word_embed_proj_dim": sizes["hidden_size"],
        "torch_dtype": "float16",
        **sizes,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "llama3-8b": _llama3(hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32),
    "llama3-70b": _llama3(hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80, num_attention_heads=64),
    "opt-350m": _opt(
        hidden_size=1024,
        ffn_dim=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        word_embed_proj_dim=512,
        do_layer_norm_before=False,
    ),
    "opt-1.3b": _opt(hidden_size=2048, ffn_dim=8192, num_hidden_layers=24, num_attention_heads=32),
    "opt-13b": _opt(hidden_size=5120, ffn_dim=20_480, num_hidden_layers=40, num_attention_heads=40),
}
"""As the checkpoints' config.json has them (Llama 3: Dubey et al. 2024; OPT: Zhang et al. 2022, table 1)."""


def model_shape(path: str) -> tuple[DecoderConfig, str]:
    """The decoder that a config names, without weights and without a network.

    Args:
      path: a preset, or a hub id that names one ("meta-llama/Meta-Llama-3-8B-Instruct"); a config.json; a folder with
        one; a .gguf file.

    Returns:
      (its config, the dtype that its weights are stored in).

    Raises:
      ValueError: none of these.
      CheckpointError: the file cannot be used.
    """
    local = local_path(path)
    if local.is_dir() and (local / "config.json").is_file():
        local = local / "config.json"
    if local.is_file() and local.suffix == ".json":
        try:
            content = read_object(local)
        except JSONFileError as error:
            raise CheckpointError(f"{local}: {error}; copy or download it again.") from error
    elif local.exists():
        return describe_pretrained(local).config, "float32"
    else:
        name = _preset(path)
        if name is None:
            raise ValueError(
                f"{path}: a plan needs shapes, not weights: give a preset ({', '.join(PRESETS)}), or a config.json or "
                "a folder with one."
            )
        content = PRESETS[name]
    dtype = content.get("dtype") or content.get("torch_dtype") or "float32"
    return config_from_hub(content), str(dtype).removeprefix("torch.")


def _preset(path: str) -> str | None:
    """Of "meta-llama/Meta-Llama-3-8B-Instruct": llama3-8b."""
    name = re.sub(r"llama-3", "llama3", path.lower().rpartition("/")[2])
    name = name.removeprefix("meta-").removesuffix("-instruct").removesuffix("-hf")
    name = re.sub(r"llama3\.\d", "llama3", name)  # 3.1 and 3.3: the same shapes, but for the rotation
    return name if name in PRESETS else None
