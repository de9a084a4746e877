"""Finds the shapes of a model without its weights: from presets, config.json files, folders and downloads."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from jax_rlhf.hub import CheckpointError, describe_pretrained
from jax_rlhf.hub.families import config_from_hub
from jax_rlhf.io.json_files import JSONFileError, read_object
from jax_rlhf.io.paths import local_path
from jax_rlhf.models import DecoderConfig
from jax_rlhf.plan.presets import PRESETS

# Parts of a hub id that do not affect shapes.
_TUNED = r"(-(instruct|chat|it|base|hf|deduped|\d?\d+k|step-\S+|intermediate-\S+|v1\.0|2407))+$"


def model_shape(path: str, revision: str | None = None) -> tuple[DecoderConfig, str]:
    """The config of a model, without its weights and without a network.

    Args:
      path: a config.json; a folder with one; a .gguf file; a hub id whose config.json has been downloaded; a preset, or
        a hub id that matches a preset ("meta-llama/Meta-Llama-3-8B-Instruct").
      revision: the revision of a hub id.

    Returns:
      (config, dtype in which the weights are stored).

    Raises:
      ValueError: the path is none of these.
      CheckpointError: the file is invalid.
    """
    local = local_path(path)
    if local.is_dir() and (local / "config.json").is_file():
        content = _read(local / "config.json")
    elif local.is_file() and local.suffix == ".json":
        content = _read(local)
    elif local.exists():
        return describe_pretrained(local).config, "float32"
    elif (downloaded := _downloaded(path, revision)) is not None:
        content = _read(downloaded)
    elif (preset := preset_of(path)) is not None:
        content = PRESETS[preset]
    else:
        raise ValueError(
            f"{path}: a plan needs shapes, not weights, and does not use the network. Use a config.json or a folder "
            f"with one, a hub id that has been downloaded (`hf download {path} config.json`), or a preset: "
            f"{', '.join(PRESETS)}."
        )
    dtype = content.get("dtype") or content.get("torch_dtype") or "float32"
    return config_from_hub(content), str(dtype).removeprefix("torch.")


def preset_of(path: str) -> str | None:
    """The preset that matches a name or hub id: llama3-8b for "meta-llama/Meta-Llama-3-8B-Instruct"; None without."""
    name = path.lower().rpartition("/")[2].removeprefix("meta-")
    name = re.sub(r"^llama-3", "llama3", name)
    name = re.sub(r"^llama3\.[13]-", "llama3-", name)  # 3.1 and 3.3 differ from 3 in the rotary scaling only
    name = re.sub(r"^mistral-7b-instruct-", "mistral-7b-", name)
    name = re.sub(r"^mistral-nemo-(instruct|base)-2407$", "mistral-nemo-12b", name)
    name = re.sub(r"^qwen2-", "qwen2.5-", name)
    name = re.sub(_TUNED, "", name)
    return name if name in PRESETS else None


def _downloaded(hub_id: str, revision: str | None) -> Path | None:
    """The downloaded config.json of a hub id; None if there is none."""
    try:
        found = try_to_load_from_cache(hub_id, "config.json", revision=revision)
    except HFValidationError:  # not a hub id
        return None
    return Path(found) if isinstance(found, str) else None


def _read(file: Path) -> dict[str, Any]:
    try:
        return read_object(file)
    except JSONFileError as error:
        raise CheckpointError(f"{file}: {error}; copy or download it again.") from error
