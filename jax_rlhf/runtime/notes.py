"""The notes of a checkpoint: JSON with a checksum of its own, which can be read without its arrays."""

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
"""The folder of a checkpoint that holds them."""


class DamagedError(Exception):
    """Files that are not as they were written."""


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Reading files: orbax and tensorstore have many words for one that is not as it was.

    Yields:
      Nothing.

    Raises:
      DamagedError: it was not; other errors are of devices, network and memory.
    """
    try:
        yield
    except (DamagedError, jax.errors.JaxRuntimeError, MemoryError):
        raise
    except Exception as error:
        raise DamagedError(first_line(error)) from error


def with_digest(content: Mapping[str, Any]) -> dict[str, Any]:
    """Notes as they are written.

    Args:
      content: what JSON can hold.

    Returns:
      The same, with its checksum.
    """
    return {"digest": _digest(content), **content}


def read_notes(checkpoint: epath.Path) -> dict[str, Any]:
    """The notes of a checkpoint.

    Args:
      checkpoint: its folder.

    Returns:
      Their content.

    Raises:
      DamagedError: they have another checksum than when they were written. Other errors are orbax's: see `reading`.
    """
    content = dict(ocp.JsonCheckpointHandler().restore(checkpoint / NOTES))
    digest = content.pop("digest", None)
    if digest != _digest(content):
        raise DamagedError("its notes have another checksum than when they were written")
    return content


def last_notes(folder: str | Path | epath.Path) -> tuple[int, dict[str, Any]] | None:
    """What a phase noted in the last checkpoint whose notes can be read, its arrays aside.

    Args:
      folder: of the phase's checkpoints.

    Returns:
      (step, notes); None where there is none.
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
    """What an error says first.

    Args:
      error: of a library.

    Returns:
      Its first line that is not blank.
    """
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:400]


def _digest(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
