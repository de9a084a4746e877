"""Replaces a folder atomically: a reader sees the old folder or the new one, even if the writer is killed."""

import contextlib
import ctypes
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from jax_rlhf.io.durable import file_errors, sync

MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "chat_template*",
)
"""The files that a model folder may contain; a folder with any other file is not replaced."""

_AT_CURRENT_FOLDER, _EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def _check_replaceable(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(f"{target} is a file; use a folder to write the model to.")
    strange = sorted(
        path.name
        for path in target.iterdir()
        if path.is_dir() or not any(path.match(pattern) for pattern in MODEL_FILES)
    )
    if strange:
        raise FileExistsError(
            f"{target} would be replaced, but it contains files that do not belong to a model: "
            f"{', '.join(strange[:5])}. Use a new or empty folder, or move these files away."
        )


@contextlib.contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Yields a new folder to fill, which replaces the target when the block ends without an error.

    The new folder is made beside the target, flushed to disk, and renamed (exchanged with an old folder, in one step on
    Linux).

    Args:
      target: the folder to make or replace.

    Raises:
      FileExistsError: the target is a file, or a folder with files that do not belong to a model.
      OSError: the disk is full, read-only, …; the target is unchanged.
    """
    target = target.resolve()
    _check_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}.partial-"
    for stale in target.parent.glob(f"{prefix}[0-9]*"):  # left by a writer that was killed
        if not stale.name.removeprefix(prefix).isdigit():
            continue
        shutil.rmtree(stale, ignore_errors=True)
    fresh = target.parent / f"{prefix}{os.getpid()}"
    fresh.mkdir()
    try:
        with file_errors(target):
            yield fresh
        readable = fresh.stat().st_mode & 0o666  # as the umask allows; safetensors makes files for the owner only
        for file in fresh.iterdir():
            file.chmod(readable)
            sync(file)
        sync(fresh)
        if target.exists():
            _exchange(fresh, target)
        else:
            fresh.rename(target)
        sync(target.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)  # the partial folder, or the old one after an exchange


def _exchange(fresh: Path, target: Path) -> None:
    if sys.platform == "linux":
        renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        if renameat2 is not None:
            paths = os.fsencode(fresh), os.fsencode(target)
            if renameat2(_AT_CURRENT_FOLDER, paths[0], _AT_CURRENT_FOLDER, paths[1], _EXCHANGE) == 0:
                return
    # On other systems, and file systems without exchange: two renames, with the old folder beside the target meanwhile.
    old = fresh.with_name(f".{target.name}.old-{os.getpid()}")
    target.rename(old)
    try:
        fresh.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
