"""What a phase's folder holds that this program wrote: so that nothing else is deleted, and no other model is taken.

`<workdir>/<phase>/manifest.json` is written before anything else in the folder. It lists digests of the models that the
phase has exported.
"""

import fnmatch
import hashlib
from pathlib import Path
from typing import Any

import jax
from absl import logging

from jax_rlhf.durable import sync, write_json
from jax_rlhf.hub import Pretrained, save_pretrained
from jax_rlhf.hub.folder import MODEL_FILES
from jax_rlhf.json_files import JSONFileError, read_object
from jax_rlhf.phases.costs import COSTS

NAME = "manifest.json"
_PROGRAM = "jax_rlhf"
_FILES = ("summary.json", "metrics.jsonl", "samples.jsonl", "stacks.txt", COSTS, NAME)
_ANY = "*"
_FOLDERS = {
    "model": MODEL_FILES,
    "model_ema": MODEL_FILES,
    "critic": MODEL_FILES,
    "checkpoints": ("[0-9]*",),  # orbax's, complete or not
    "checkpoints.damaged": ("[0-9]*",),
    "bad_batch": ("step*.npz",),
    "tensorboard": ("events.out.tfevents.*",),
    "wandb": (_ANY,),  # another program's
}
_HALF_DONE = (".*.partial-*", ".*.old-*")  # folders that a writer left who was killed
_SUFFIX = ".partial"


class ManifestError(ValueError):
    """A folder is not what this program made of it; the message says what differs."""


def begin_manifest(folder: Path) -> None:
    """Says that a folder is this program's, where it does not yet; process 0 does it.

    Args:
      folder: <workdir>/<phase>, which is there.

    Raises:
      OSError: it cannot be written.
    """
    if jax.process_index() == 0 and not (folder / NAME).exists():
        write_json(folder / NAME, {"program": _PROGRAM, "phase": folder.name, "models": {}})
        sync(folder.parent)  # the folder's own name


def export_model(folder: Path, pretrained: Pretrained) -> None:
    """Writes a model, and its files' digests into the manifest beside it; of several processes all must call it.

    Args:
      folder: <workdir>/<phase>/model, or one of its siblings.
      pretrained: the model.

    Raises:
      CheckpointError, FileExistsError, OSError: as `save_pretrained`.
    """
    save_pretrained(folder, pretrained)
    if jax.process_index() == 0:
        try:
            content = _read(folder.parent)
        except ManifestError as error:  # the model is worth more than the list
            logging.warning("%s; it is written anew.", error)
            content = None
        content = content or {"program": _PROGRAM, "phase": folder.parent.name, "models": {}}
        content["models"][folder.name] = {file.name: _digest(file) for file in sorted(folder.iterdir())}
        write_json(folder.parent / NAME, content)


def check_model(folder: Path) -> None:
    """Whether a model is as it was exported.

    Args:
      folder: of a model.

    Raises:
      ManifestError: a file is missing or has another content; the message names it.
      OSError: a file cannot be read.
    """
    content = _read(folder.parent)
    listed = None if content is None else content["models"].get(folder.name)
    if listed is None:
        raise ManifestError(f"{folder.parent / NAME} does not list it")
    for name, digest in listed.items():
        file = folder / name
        if not file.is_file():
            raise ManifestError(f"{file} is missing")
        if _digest(file) != digest:
            raise ManifestError(f"{file} has another content than when it was exported")


def listed_models(folder: Path) -> list[str]:
    """The models that a phase has exported.

    Args:
      folder: <workdir>/<phase>.

    Returns:
      Their folders' names.

    Raises:
      ManifestError: the manifest cannot be read.
    """
    content = _read(folder)
    return [] if content is None else sorted(content["models"])


def check_deletable(folder: Path) -> None:
    """Whether a folder holds nothing but what this program wrote.

    Args:
      folder: <workdir>/<phase>; need not be there.

    Raises:
      ManifestError: it holds something else, which the message names.
    """
    if not folder.exists() and not folder.is_symlink():
        return
    if folder.is_symlink() or not folder.is_dir():
        raise ManifestError(f"{folder} is a {'link' if folder.is_symlink() else 'file'}")
    entries = sorted(folder.iterdir())
    content = _read(folder)
    if entries and content is None:
        raise ManifestError(f"{folder} has no {NAME}, by which it would be known as this program's")
    strange = [path for entry in entries for path in _not_ours(entry, content or {})]
    if strange:
        names = ", ".join(str(path.relative_to(folder)) for path in strange[:5])
        raise ManifestError(f"{folder} holds what this program did not write: {names}")


def _not_ours(entry: Path, content: dict[str, Any]) -> list[Path]:
    name = entry.name
    if entry.is_symlink():
        return [entry]
    if not entry.is_dir():
        return [] if name.removesuffix(_SUFFIX) in _FILES else [entry]
    if any(fnmatch.fnmatch(name, pattern) for pattern in _HALF_DONE):
        return []
    if name not in _FOLDERS:
        return [entry]
    patterns = content["models"].get(name, _FOLDERS[name])
    return [inner for inner in sorted(entry.iterdir()) if not any(fnmatch.fnmatch(inner.name, one) for one in patterns)]


def _read(folder: Path) -> dict[str, Any] | None:
    """The manifest; None where there is none."""
    try:
        content = read_object(folder / NAME)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except JSONFileError as error:
        raise ManifestError(f"{folder / NAME} cannot be read: {error}") from error
    models = content.get("models")
    whole = content.get("program") == _PROGRAM and isinstance(models, dict)
    if not whole or not all(isinstance(files, dict) for files in models.values()):
        raise ManifestError(f"{folder / NAME} is not what this program writes")
    return content


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
