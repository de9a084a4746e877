"""What a phase's folder holds that this program wrote: so that nothing else is deleted, and no other model is taken.

`<workdir>/<phase>/manifest.json` is written before anything else in the folder. It lists digests of the models that the
phase has exported.
"""

import fnmatch
import hashlib
import re
from pathlib import Path
from typing import Any

import jax
from absl import logging
from etils import epath

from jax_rlhf.hub import Pretrained, save_pretrained
from jax_rlhf.hub.folder import MODEL_FILES
from jax_rlhf.io.durable import file_errors, sync, write_json
from jax_rlhf.io.json_files import JSONFileError, read_object
from jax_rlhf.runtime.costs import COSTS

NAME = "manifest.json"
_PROGRAM = "jax_rlhf"
_FILES = ("summary.json", "metrics.jsonl", "samples.jsonl", "stacks.txt", COSTS, NAME)
_FOLDERS = {
    "bad_batch": ("step*.npz",),
    "tensorboard": ("events.out.tfevents.*",),
    "wandb": ("*",),  # another program's
}
MODELS = ("model", "model_ema", "critic")
"""Folders that a phase exports models to."""
_CHECKPOINTS = ("checkpoints", "checkpoints.damaged")
# Complete or not, and what they hold.
_CHECKPOINT = re.compile(r"[0-9]+(\.orbax-checkpoint-tmp.*)?")
_IN_CHECKPOINT = re.compile(
    r"(state|notes)(\.orbax-checkpoint-tmp.*)?|_CHECKPOINT_METADATA|commit_success\.txt|descriptor|synced"
)
_HALF_DONE = re.compile(rf"\.({'|'.join(MODELS)})\.(partial|old)-[0-9]+")  # a writer left them who was killed
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
    """Writes a model in its compute dtype, and its files' digests into the manifest beside it.

    Of several processes all must call it.

    Args:
      folder: <workdir>/<phase>/model, or one of its siblings.
      pretrained: the model.

    Raises:
      CheckpointError, FileExistsError, OSError: as `save_pretrained`.
    """
    _list(folder, None)  # should the writer be killed, former digests are of another model
    save_pretrained(folder, pretrained, dtype=pretrained.model.config.dtype)
    if jax.process_index() == 0:
        _list(folder, {file.name: _digest(file) for file in sorted(folder.iterdir())})


def _list(folder: Path, files: dict[str, str] | None) -> None:
    """Puts a model's digests into the manifest; None = it is being written."""
    if jax.process_index() > 0:
        return
    try:
        content = _read(folder.parent)
    except ManifestError as error:  # the model is worth more than the list
        logging.warning("%s; it is written anew.", error)
        content = None
    content = content or {"program": _PROGRAM, "phase": folder.parent.name, "models": {}}
    content["models"][folder.name] = files
    write_json(folder.parent / NAME, content)


def check_model(folder: Path) -> None:
    """Whether a model is as it was exported.

    Args:
      folder: of a model.

    Raises:
      ManifestError: a file is missing, is new or has another content; the message names it.
      OSError: a file cannot be read.
    """
    content = _read(folder.parent)
    if content is None or folder.name not in content["models"]:
        raise ManifestError(f"{folder.parent / NAME} does not list it")
    listed = content["models"][folder.name]
    if listed is None:
        raise ManifestError("its export did not end")
    for name, digest in listed.items():
        file = folder / name
        if not file.is_file():
            raise ManifestError(f"{file} is missing")
        if _digest(file) != digest:
            raise ManifestError(f"{file} has another content than when it was exported")
    for file in sorted(folder.iterdir()):  # of a README nothing is loaded
        if file.name not in listed and any(fnmatch.fnmatch(file.name, pattern) for pattern in MODEL_FILES):
            raise ManifestError(f"{file} was not exported with it")


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


def check_unused(folder: Path) -> None:
    """Whether a phase may begin in a folder: in one of this program, or an empty one.

    Args:
      folder: <workdir>/<phase>; need not be there.

    Raises:
      ManifestError: it is somebody else's.
    """
    if folder.is_dir() and not (folder / NAME).exists():
        strange = sorted(entry.name for entry in folder.iterdir() if entry.name != NAME + _SUFFIX)
        if strange:
            raise ManifestError(f"{folder} holds what this program did not write: {', '.join(strange[:5])}")


def check_deletable(folder: Path, checkpoints: Path | epath.Path) -> None:
    """Whether a folder holds nothing but what this program wrote.

    Args:
      folder: <workdir>/<phase>; need not be there.
      checkpoints: where the phase's are, which may be a bucket.

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
    models = {} if content is None else content["models"]
    strange = [path for entry in entries for path in _not_ours(entry, models, checkpoints)]
    if strange:
        raise ManifestError(f"{folder} holds what this program did not write: {', '.join(strange[:5])}")


def _not_ours(entry: Path, models: dict[str, Any], checkpoints: Path | epath.Path) -> list[str]:
    """What of an entry of the folder is somebody else's, by their paths in it."""
    name = entry.name
    if not entry.is_dir() or entry.is_symlink():
        return [] if name.removesuffix(_SUFFIX) in _FILES and not entry.is_symlink() else [name]
    if _HALF_DONE.fullmatch(name):
        return []
    if name in _CHECKPOINTS:
        place = epath.Path(checkpoints).with_name(name)
        return [f"{name}/{inner}" for inner in (_not_checkpoints(place) if place.exists() else [])]
    if name in MODELS:
        return [f"{name}/{inner}" for inner in _not_the_model(entry, models.get(name))]
    if name not in _FOLDERS:
        return [name]
    inside = sorted(inner.name for inner in entry.iterdir())
    return [f"{name}/{inner}" for inner in inside if not any(fnmatch.fnmatch(inner, one) for one in _FOLDERS[name])]


def _not_checkpoints(folder: epath.Path) -> list[str]:
    strange = []
    for entry in sorted(folder.iterdir()):
        if not _CHECKPOINT.fullmatch(entry.name) or not entry.is_dir():
            strange.append(entry.name)
            continue
        names = sorted(inner.name for inner in entry.iterdir())
        strange += [f"{entry.name}/{name}" for name in names if not _IN_CHECKPOINT.fullmatch(name)]
    return strange


def _not_the_model(folder: Path, listed: dict[str, str] | None) -> list[str]:
    if listed is None:  # it was being written
        names = [entry.name for entry in folder.iterdir()]
        return [name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in MODEL_FILES)]
    strange = []
    for file in sorted(folder.iterdir()):
        if file.name not in listed or not file.is_file():
            strange.append(file.name)
        elif _digest(file) != listed[file.name]:
            strange.append(f"{file.name} (another content)")
    return strange


def _read(folder: Path) -> dict[str, Any] | None:
    """The manifest; None where there is none."""
    try:
        content = read_object(folder / NAME)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except JSONFileError as error:
        raise ManifestError(f"{folder / NAME} cannot be read: {error}") from error
    models = content.get("models")
    if not isinstance(models, dict) or content.get("program") != _PROGRAM:
        raise ManifestError(f"{folder / NAME} is not what this program writes")
    if not all(files is None or isinstance(files, dict) for files in models.values()):
        raise ManifestError(f"{folder / NAME} is not what this program writes")
    return content


def _digest(file: Path) -> str:
    with file_errors(file), file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
