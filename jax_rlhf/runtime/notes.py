"""The notes of a checkpoint: JSON with its own checksum, which can be read without the arrays."""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

NOTES = "notes"
"""The subfolder of a checkpoint with its notes."""


class DamagedError(Exception):
    """Files of a checkpoint are damaged or missing."""


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Turns the many kinds of errors that orbax and tensorstore raise for damaged files into DamagedError.

    Raises:
      DamagedError: a file is damaged or missing. Errors of devices and memory pass unchanged.
    """
    try:
        yield
    except (DamagedError, jax.errors.JaxRuntimeError, MemoryError):
        raise
    except Exception as error:
        raise DamagedError(first_line(error)) from error


def with_digest(content: Mapping[str, Any]) -> dict[str, Any]:
    """Adds a checksum to notes, which must be JSON values."""
    return {"digest": _digest(content), **content}


def read_notes(checkpoint: epath.Path) -> dict[str, Any]:
    """Reads the notes of a checkpoint.

    Raises:
      DamagedError: their checksum is wrong. For other errors, which come from orbax, use `reading`.
    """
    content = dict(ocp.JsonCheckpointHandler().restore(checkpoint / NOTES))
    digest = content.pop("digest", None)
    if digest != _digest(content):
        raise DamagedError("wrong checksum of its notes")
    return content


def last_notes(folder: str | Path | epath.Path) -> tuple[int, dict[str, Any]] | None:
    """(step, notes) of the last checkpoint with readable notes; None if there is none. Arrays are not read.

    Args:
      folder: the folder of a phase's checkpoints.
    """
    folder = epath.Path(folder)
    found = [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    for step in sorted(found, reverse=True):
        try:
            with reading():
                return step, read_notes(folder / str(step))["notes"]
        except DamagedError as error:
            logging.warning("%s: its notes cannot be read: %s", folder / str(step), error)
    return None


def first_line(error: Exception) -> str:
    """The first line of an error's message that is not blank, at most 400 characters."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:400]


def _digest(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
