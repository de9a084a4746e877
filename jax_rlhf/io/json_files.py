"""JSON files that others wrote: nothing is taken from one before its size, depth and texts have been looked at."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jax_rlhf.io.durable import file_errors

MOST_BYTES = 16 * 2**20
DEEPEST = 64
_SURROGATE = re.compile(r"[\ud800-\udfff]")


class JSONFileError(ValueError):
    """A file that holds no such JSON; the message says why, and not where."""


def read_object(file: Path, *, most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
      file: a file.
      most_bytes: a larger one is not read.

    Returns:
      Its content: nested at most 64 deep, and every text of it can be written as UTF-8.

    Raises:
      JSONFileError: the file is a folder, too large, not UTF-8, not JSON, no object, or nested too deeply.
      FileNotFoundError: there is no such file.
      OSError: it cannot be read.
    """
    if file.is_dir():
        raise JSONFileError("it is a folder")
    with file_errors(file), file.open("rb") as stream:
        content = stream.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise JSONFileError(f"it has more than {most_bytes:,} bytes")
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise JSONFileError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise JSONFileError(f"a JSON object is expected, this is {json.dumps(value)[:40]}")
    for level in levels(value):
        lone = next((text for text in level if isinstance(text, str) and _SURROGATE.search(text)), None)
        if lone is not None:
            raise JSONFileError(f"half of a surrogate pair, which is no character, in {lone[:80]!r}")
    return value


def levels(value: Any) -> Iterator[list[Any]]:
    """A value, what it holds, what that holds …: a deep value cannot be walked by recursion.

    Args:
      value: what JSON can hold.

    Yields:
      What is on each level, keys and values.

    Raises:
      JSONFileError: there are more than 64.
    """
    level = [value]
    for _ in range(DEEPEST):
        yield level
        children: list[Any] = []
        for inner in level:
            if isinstance(inner, dict):
                children += [*inner, *inner.values()]
            elif isinstance(inner, list | tuple):
                children += inner
        if not children:
            return
        level = children
    raise JSONFileError(f"it is nested more than {DEEPEST} deep")
