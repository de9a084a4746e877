"""Manifests: which files of a phase's folder this program wrote.

With them --overwrite deletes no foreign files, and a phase notices that a model has changed since its export.
`<workdir>/<phase>/manifest.json` is the first file in the folder. It has digests of the models that the phase exported.
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
    "wandb": ("*",),  # written by wandb
}
MODELS = ("model", "model_ema", "critic")
"""Names of the folders that a phase exports models to."""
_CHECKPOINTS = ("checkpoints", "checkpoints.damaged")
# Complete and incomplete checkpoints, and their content.
_CHECKPOINT = re.compile(r"[0-9]+(\.orbax-checkpoint-tmp.*)?")
_IN_CHECKPOINT = re.compile(
    r"(state|notes)(\.orbax-checkpoint-tmp.*)?|_CHECKPOINT_METADATA|commit_success\.txt|descriptor|synced"
)
_INCOMPLETE_EXPORT = re.compile(rf"\.({'|'.join(MODELS)})\.(partial|old)-[0-9]+")  # left by a killed process
_SUFFIX = ".partial"


class ManifestError(ValueError):
    """A folder is not as this program wrote it; the message says what differs."""


def begin_manifest(folder: Path) -> None:
    """Writes an empty manifest if the folder has none; only process 0 writes.

    Args:
      folder: <workdir>/<phase>, which must exist.

    Raises:
      OSError: the manifest cannot be written.
    """
    if jax.process_index() == 0 and not (folder / NAME).exists():
        write_json(folder / NAME, {"program": _PROGRAM, "phase": folder.name, "models": {}})
        sync(folder.parent)  # makes the folder's name durable


def export_model(folder: Path, pretrained: Pretrained) -> None:
    """Writes a model in its compute dtype, and adds the digests of its files to the manifest.

    All processes must call this function.

    Args:
      folder: <workdir>/<phase>/model, or another folder of MODELS.
      pretrained: the model.

    Raises:
      CheckpointError, FileExistsError, OSError: as `save_pretrained`.
    """
    _update_manifest(folder, None)  # first, since the old digests would be wrong if this process were killed
    save_pretrained(folder, pretrained, dtype=pretrained.model.config.dtype)
    if jax.process_index() == 0:
        _update_manifest(folder, {file.name: _digest(file) for file in sorted(folder.iterdir())})


def _update_manifest(folder: Path, files: dict[str, str] | None) -> None:
    """Sets a model's digests in the manifest; None = it is being written."""
    if jax.process_index() > 0:
        return
    try:
        content = _read(folder.parent)
    except ManifestError as error:  # a damaged manifest is no reason to lose the model
        logging.warning("%s; writing a new one.", error)
        content = None
    content = content or {"program": _PROGRAM, "phase": folder.parent.name, "models": {}}
    content["models"][folder.name] = files
    write_json(folder.parent / NAME, content)


def check_model(folder: Path) -> None:
    """Checks that a model has not changed since its export.

    Args:
      folder: the model's folder.

    Raises:
      ManifestError: a file is missing, was added or has changed; the message names it.
      OSError: a file cannot be read.
    """
    content = _read(folder.parent)
    if content is None or folder.name not in content["models"]:
        raise ManifestError(f"{folder.parent / NAME} does not list this model")
    listed = content["models"][folder.name]
    if listed is None:
        raise ManifestError("its export was interrupted")
    for name, digest in listed.items():
        file = folder / name
        if not file.is_file():
            raise ManifestError(f"{file} is missing")
        if _digest(file) != digest:
            raise ManifestError(f"{file} has changed since the export")
    for file in sorted(folder.iterdir()):  # other files, such as a README, are not loaded
        if file.name not in listed and any(fnmatch.fnmatch(file.name, pattern) for pattern in MODEL_FILES):
            raise ManifestError(f"{file} was added after the export")


def listed_models(folder: Path) -> list[str]:
    """The names of the models that a phase has exported.

    Args:
      folder: <workdir>/<phase>.

    Raises:
      ManifestError: the manifest cannot be read.
    """
    content = _read(folder)
    return [] if content is None else sorted(content["models"])


def check_unused(folder: Path) -> None:
    """Checks that a phase may start in a folder: one with a manifest, an empty one, or one that does not exist.

    Args:
      folder: <workdir>/<phase>.

    Raises:
      ManifestError: the folder contains foreign files.
    """
    if folder.is_dir() and not (folder / NAME).exists():
        foreign = sorted(entry.name for entry in folder.iterdir() if entry.name != NAME + _SUFFIX)
        if foreign:
            raise ManifestError(f"{folder} contains files that this program did not write: {', '.join(foreign[:5])}")


def check_deletable(folder: Path, checkpoints: Path | epath.Path) -> None:
    """Checks that a folder contains only files that this program wrote, or does not exist.

    Args:
      folder: <workdir>/<phase>.
      checkpoints: the folder of the phase's checkpoints, which may be in a bucket.

    Raises:
      ManifestError: it contains other files; the message names them.
    """
    if not folder.exists() and not folder.is_symlink():
        return
    if folder.is_symlink() or not folder.is_dir():
        raise ManifestError(f"{folder} is a {'link' if folder.is_symlink() else 'file'}")
    entries = sorted(folder.iterdir())
    content = _read(folder)
    if entries and content is None:
        raise ManifestError(f"{folder} has no {NAME}, so this program may not have written it")
    models = {} if content is None else content["models"]
    foreign = [path for entry in entries for path in _foreign_files(entry, models, checkpoints)]
    if foreign:
        raise ManifestError(f"{folder} contains files that this program did not write: {', '.join(foreign[:5])}")


def _foreign_files(entry: Path, models: dict[str, Any], checkpoints: Path | epath.Path) -> list[str]:
    """Paths in an entry of a phase's folder that this program did not write, relative to the folder."""
    name = entry.name
    if not entry.is_dir() or entry.is_symlink():
        return [] if name.removesuffix(_SUFFIX) in _FILES and not entry.is_symlink() else [name]
    if _INCOMPLETE_EXPORT.fullmatch(name):
        return []
    if name in _CHECKPOINTS:
        found = epath.Path(checkpoints).with_name(name)
        return [f"{name}/{inner}" for inner in (_foreign_in_checkpoints(found) if found.exists() else [])]
    if name in MODELS:
        return [f"{name}/{inner}" for inner in _foreign_in_model(entry, models.get(name))]
    if name not in _FOLDERS:
        return [name]
    inside = sorted(inner.name for inner in entry.iterdir())
    return [f"{name}/{inner}" for inner in inside if not any(fnmatch.fnmatch(inner, one) for one in _FOLDERS[name])]


def _foreign_in_checkpoints(folder: epath.Path) -> list[str]:
    foreign = []
    for entry in sorted(folder.iterdir()):
        if not _CHECKPOINT.fullmatch(entry.name) or not entry.is_dir():
            foreign.append(entry.name)
            continue
        names = sorted(inner.name for inner in entry.iterdir())
        foreign += [f"{entry.name}/{name}" for name in names if not _IN_CHECKPOINT.fullmatch(name)]
    return foreign


def _foreign_in_model(folder: Path, listed: dict[str, str] | None) -> list[str]:
    if listed is None:  # the export was interrupted
        names = [entry.name for entry in folder.iterdir()]
        return [name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in MODEL_FILES)]
    foreign = []
    for file in sorted(folder.iterdir()):
        if file.name not in listed or not file.is_file():
            foreign.append(file.name)
        elif _digest(file) != listed[file.name]:
            foreign.append(f"{file.name} (changed)")
    return foreign


def _read(folder: Path) -> dict[str, Any] | None:
    """The manifest of a phase's folder; None if there is none."""
    try:
        content = read_object(folder / NAME)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except JSONFileError as error:
        raise ManifestError(f"{folder / NAME} cannot be read: {error}") from error
    models = content.get("models")
    if not isinstance(models, dict) or content.get("program") != _PROGRAM:
        raise ManifestError(f"{folder / NAME} was not written by this program")
    if not all(files is None or isinstance(files, dict) for files in models.values()):
        raise ManifestError(f"{folder / NAME} was not written by this program")
    return content


def _digest(file: Path) -> str:
    with file_errors(file), file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
