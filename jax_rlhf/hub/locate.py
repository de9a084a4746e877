"""Finds a checkpoint (a folder, a GGUF file or a hub id), and reads its JSON files."""

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
    """Finds a checkpoint, and downloads it if it is a hub id.

    Args:
      path_or_hub_id: a folder, a .gguf file or a folder with one, or a hub id.
      revision: the revision of a hub id.
      weights: whether to download the weights too.

    Returns:
      A local folder or .gguf file.

    Raises:
      FileNotFoundError: there is no such file, folder or hub id.
      CheckpointError: the folder has several GGUF files, or the file is not a GGUF file.
    """
    local = local_path(path_or_hub_id)
    if local.is_dir():
        inside = sorted(local.glob("*.gguf"))
        if inside and not (local / "config.json").is_file():
            if len(inside) > 1:
                names = ", ".join(file.name for file in inside)
                raise CheckpointError(f"{local} has several GGUF files ({names}); use the path of one of them.")
            return inside[0]
        return local
    if local.is_file():
        if local.suffix != ".gguf":
            raise CheckpointError(f"{local} is a file; use the path of its folder, or of a .gguf file.")
        return local
    text = str(path_or_hub_id)
    if text.count("/") > 1 or text.startswith((".", "/", "~")) or local.suffix in (".gguf", ".safetensors"):
        raise FileNotFoundError(f"{text}: no such file or folder.")
    try:
        files = [pattern for pattern in _HUB_FILES if weights or not pattern.endswith(".safetensors")]
        return Path(snapshot_download(text, revision=revision, allow_patterns=files))
    except (OSError, HFValidationError) as error:  # errors of huggingface_hub are OSErrors
        raise FileNotFoundError(
            f"{text}: there is no such folder, and it cannot be downloaded from the hub: {error}. For a private model "
            "log in with `hf auth login`; without a network use a local folder."
        ) from error


def open_source(
    path: Path, name: str, *, weights: bool = True
) -> tuple[TensorSource | None, dict[str, Any], dict[str, Any] | None]:
    """Opens a checkpoint.

    Args:
      path: the local folder or .gguf file, from `resolve`.
      name: the path or hub id that the user set, for error messages.
      weights: whether to open the tensors too.

    Returns:
      (tensors or None, content of config.json, content of generation_config.json). If there is no
      generation_config.json, its content is taken from config.json, or None if config.json has none.

    Raises:
      FileNotFoundError: a file is missing.
      CheckpointError: a file is invalid.
    """
    if path.suffix == ".gguf" and path.is_file():
        source = GGUFSource(path)
        return source, source.config, checked_ids(source.generation_config, str(path))
    config = _read_json(path / "config.json")
    if config is None and (path / ADAPTER).is_file():
        raise CheckpointError(adapter_message(path, name))
    if config is None:
        raise FileNotFoundError(f"{path / 'config.json'} is missing; it has the model's architecture. Copy it there.")
    generation_config = _read_json(path / "generation_config.json")
    if generation_config is None and config.get("eos_token_id") is not None:  # as transformers does
        generation_config = {name: config.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if generation_config is not None:
        file = str(path / "generation_config.json")
        generation_config = checked_ids(generation_config, file)
        check_generation_config(generation_config, file)
    return SafetensorsSource(path, name) if weights else None, config, generation_config


def _read_json(file: Path) -> dict[str, Any] | None:
    try:
        return read_object(file)
    except FileNotFoundError:
        return None
    except JSONFileError as error:
        raise CheckpointError(f"{file}: {error}; copy or download it again.") from error


def in_file(path: Path, read: Callable, content: dict[str, Any]) -> DecoderConfig:
    """Calls `read` with a config, and adds the checkpoint's path to its errors."""
    try:
        return read(content)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
