"""Small random checkpoints of every family, made without torch.

Each case is the content of a config.json. The tensors' names and shapes are those of torch transformers
(`tests/fixtures/torch_models.json`). Their numbers come from NumPy's frozen legacy generator. Torch's logits on
`batch()` are in `tests/fixtures/torch_logits.npz`. `python -m tests.hub.make_fixtures` writes both files.
"""

import json
import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

FIXTURES = Path(__file__).parents[1] / "fixtures"
VOCAB, LENGTH = 61, 11

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 36,
    "intermediate_size": 49,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _case(kind: str, **changes: object) -> dict:
    return {"model_type": kind, **_SIZES, **changes}


def _rope(kind: str, **changes: object) -> dict:
    return {"rope_type": kind, "rope_theta": 1000.0, **changes}


_GPT2 = {
    "model_type": "gpt2",
    "vocab_size": VOCAB,
    "n_embd": 36,
    "n_layer": 3,
    "n_head": 6,
    "n_positions": 64,
    **_SPECIAL,
}
_NEOX = {
    "model_type": "gpt_neox",
    "vocab_size": VOCAB,
    "hidden_size": 36,
    "intermediate_size": 49,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 64,
    **_SPECIAL,
}
_OPT = {
    "model_type": "opt",
    "vocab_size": VOCAB,
    "hidden_size": 36,
    "ffn_dim": 49,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    **_SPECIAL,
}
_GEMMA = {"head_dim": 10, "query_pre_attn_scalar": 7, "sliding_window": 3, "num_hidden_layers": 4}

CASES: dict[str, dict] = {
    "llama": _case("llama", head_dim=10),
    "llama_biases": _case("llama", attention_bias=True, mlp_bias=True, rms_norm_eps=1e-3),
    "llama_old_names": _case("llama", rope_theta=500.0, rope_scaling={"type": "linear", "factor": 3.0}),
    "llama_llama3": _case(
        "llama",
        rope_parameters=_rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
    ),
    "llama_yarn": _case(
        "llama", rope_parameters=_rope("yarn", factor=4.0, original_max_position_embeddings=16), head_dim=12
    ),
    "llama_yarn_mscale": _case(
        "llama",
        rope_parameters=_rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=16,
            mscale=0.7,
            mscale_all_dim=0.3,
            beta_fast=4.0,
            beta_slow=0.5,
            truncate=False,
        ),
    ),
    "smollm2": _case("llama", tie_word_embeddings=True, num_key_value_heads=3, rope_theta=100000.0),
    "mistral": _case("mistral", sliding_window=4, head_dim=8),
    "mistral_no_window": _case("mistral", sliding_window=None),
    "qwen2": _case("qwen2", tie_word_embeddings=True),
    "qwen2_window": _case("qwen2", use_sliding_window=True, sliding_window=3, max_window_layers=1),
    "qwen3": _case("qwen3", head_dim=10),
    "qwen3_biases": _case("qwen3", head_dim=8, attention_bias=True, tie_word_embeddings=True),
    "gemma2": _case("gemma2", **_GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma2_uncapped": _case("gemma2", **_GEMMA, attn_logit_softcapping=None, final_logit_softcapping=None),
    "gemma3": _case("gemma3_text", **_GEMMA, sliding_window_pattern=2),
    "gemma3_scaled": _case(
        "gemma3_text",
        **_GEMMA,
        rope_theta=5000.0,
        rope_local_base_freq=100.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        final_logit_softcapping=4.0,
    ),
    "phi3": _case("phi3", hidden_size=48, partial_rotary_factor=0.75, sliding_window=5),
    "phi3_longrope": _case(
        "phi3",
        hidden_size=48,
        original_max_position_embeddings=8,
        rope_scaling={
            "type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.5, 2.0, 3.0, 4.0],
        },
    ),
    "gpt2": _GPT2,
    "gpt2_options": _GPT2 | {"scale_attn_by_inverse_layer_idx": True, "n_inner": 50, "activation_function": "relu"},
    "pythia": _NEOX | {"rotary_pct": 0.25, "rotary_emb_base": 500},
    "gpt_neox_sequential": _NEOX
    | {"use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True, "rotary_pct": 1.0},
    "opt": _OPT,
    "opt_350m": _OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 20},
    "opt_bare": _OPT | {"enable_bias": False, "layer_norm_elementwise_affine": False, "_remove_final_layer_norm": True},
}


def batch() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Three rows of LENGTH slots: left-padded, right-padded, and without pads.

    Returns:
      (tokens int64, mask bool, positions int64), each [3, LENGTH]; positions count the real tokens before each.
    """
    tokens = np.random.RandomState(7).randint(3, VOCAB, (3, LENGTH))
    mask = np.ones((3, LENGTH), bool)
    mask[0, :4] = False
    mask[1, 6:] = False
    tokens[~mask] = 0
    return tokens, mask, np.maximum(np.cumsum(mask, axis=1) - 1, 0)


def weight(name: str, shape: tuple[int, ...], *, around_one: bool) -> np.ndarray:
    """The numbers of one tensor, with standard deviation 0.2; their mean is 1 if `around_one`, otherwise 0."""
    generator = np.random.RandomState(zlib.crc32(name.encode()) % 2**31)
    numbers = 0.2 * generator.standard_normal(shape)
    return (numbers + around_one).astype(np.float32)


def is_norm_scale(case: str, name: str) -> bool:
    """Whether a tensor is a norm's scale that is 1 by default. Gemma's scales are 0 by default: the model adds 1."""
    norm = "norm" in name or ".ln_" in name or "layernorm" in name
    return norm and name.endswith("weight") and not case.startswith("gemma")


def tensors(case: str, head: str = "lm") -> dict[str, np.ndarray]:
    """The tensors of torch transformers' checkpoint of a case."""
    shapes = json.loads((FIXTURES / "torch_models.json").read_text())[case][head]
    return {name: weight(name, tuple(shape), around_one=is_norm_scale(case, name)) for name, shape in shapes.items()}


def write_checkpoint(folder: Path, case: str, head: str = "lm") -> Path:
    """A checkpoint folder as torch transformers would write it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = CASES[case] | ({"num_labels": 1} if head == "scalar" else {})
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors(case, head), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def stored_logits(case: str, head: str = "lm") -> np.ndarray:
    """Torch's logits on `batch()`: float32[3, LENGTH, VOCAB], or the scalar head's float32[3, LENGTH]."""
    with np.load(FIXTURES / "torch_logits.npz") as stored:
        return stored[f"{case}/{head}"]
