"""Where a checkpoint is: a folder, a GGUF file or a hub id; and what its JSON files say."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from jax_rlhf.hub.checkpoint_error import CheckpointError
from jax_rlhf.hub.export import check_generation_config
from jax_rlhf.hub.gguf import GGUFSource
from jax_rlhf.hub.limits import checked_ids
from jax_rlhf.hub.safetensors_source import ADAPTER, SafetensorsSource, TensorSource, adapter_message
from jax_rlhf.io.json_files import JSONFileError, read_object
from jax_rlhf.io.paths import local_path
from jax_rlhf.models import DecoderConfig

_HUB_FILES = ["*.json", "model*.safetensors", "tokenizer*", "*.model", "merges.txt", "vocab.txt", "*.jinja"]


def resolve(path_or_hub_id: str | Path, revision: str | None, *, weights: bool = True) -> Path:
    """Finds a checkpoint, and downloads it where a hub id is given.

    Args:
      path_or_hub_id: a folder, a .gguf file or a folder with one, or a hub id.
      revision: of a hub id.
      weights: download those too.

    Returns:
      A local folder or .gguf file.

    Raises:
      FileNotFoundError: there is nothing of that name.
      CheckpointError: it is not clear which file is meant.
    """
    local = local_path(path_or_hub_id)
    if local.is_dir():
        inside = sorted(local.glob("*.gguf"))
        if inside and not (local / "config.json").is_file():
            if len(inside) > 1:
                names = ", ".join(file.name for file in inside)
                raise CheckpointError(f"{local} holds several GGUF files ({names}); give the path of one.")
            return inside[0]
        return local
    if local.is_file():
        if local.suffix != ".gguf":
            raise CheckpointError(f"{local} is a file; give its folder, or a .gguf file.")
        return local
    text = str(path_or_hub_id)
    if text.count("/") > 1 or text.startswith((".", "/", "~")) or local.suffix in (".gguf", ".safetensors"):
        raise FileNotFoundError(f"{text}: no such file or folder.")
    try:
        files = [pattern for pattern in _HUB_FILES if weights or not pattern.endswith(".safetensors")]
        return Path(snapshot_download(text, revision=revision, allow_patterns=files))
    except (OSError, HFValidationError) as error:  # the hub's errors are OSErrors
        raise FileNotFoundError(
            f"{text}: no such folder here, and not to be had from the hub: {error}. For a private model log in with "
            "`hf auth login`; without a network give a local folder."
        ) from error


def open_source(
    place: Path, name: str, *, weights: bool = True
) -> tuple[TensorSource | None, dict[str, Any], dict[str, Any] | None]:
    """Opens a checkpoint.

    Args:
      place: from `resolve`.
      name: what the user called it, for messages.
      weights: its tensors too.

    Returns:
      (tensors, or None without weights; config.json; generation_config.json or what config.json says of the same, or
      None).

    Raises:
      FileNotFoundError, CheckpointError: a file is missing or broken.
    """
    if place.suffix == ".gguf" and place.is_file():
        source = GGUFSource(place)
        return source, source.config, checked_ids(source.generation_config, str(place))
    config = _read_json(place / "config.json")
    if config is None and (place / ADAPTER).is_file():
        raise CheckpointError(adapter_message(place, name))
    if config is None:
        raise FileNotFoundError(f"{place / 'config.json'} is missing; it says what the model is made of.")
    generation_config = _read_json(place / "generation_config.json")
    if generation_config is None and config.get("eos_token_id") is not None:  # as transformers has it
        generation_config = {name: config.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if generation_config is not None:
        file = str(place / "generation_config.json")
        generation_config = checked_ids(generation_config, file)
        check_generation_config(generation_config, file)
    return SafetensorsSource(place, name) if weights else None, config, generation_config


def _read_json(file: Path) -> dict[str, Any] | None:
    try:
        return read_object(file)
    except FileNotFoundError:
        return None
    except JSONFileError as error:
        raise CheckpointError(f"{file}: {error}; copy or download it again.") from error


def in_file(place: Path, read: Callable, content: dict[str, Any]) -> DecoderConfig:
    """What `read` makes of a config, its errors with the checkpoint's place."""
    try:
        return read(content)
    except CheckpointError as error:
        raise CheckpointError(f"{place}: {error}") from error
