"""Reads JSON files from untrusted sources; size, depth of nesting and texts are checked before the content is used."""

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
    """A JSON file is invalid; the message says why, but does not name the file."""


def read_object(file: Path, *, most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
      file: the file.
      most_bytes: the largest allowed size.

    Returns:
      The object. It is nested at most 64 deep, and all its texts can be encoded as UTF-8.

    Raises:
      JSONFileError: the file is a folder, too large, not UTF-8, not JSON, not an object, or nested too deeply.
      FileNotFoundError: the file does not exist.
      OSError: the file cannot be read.
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
        raise JSONFileError(f"it must be a JSON object, and is {json.dumps(value)[:40]}")
    for level in levels(value):
        lone = next((text for text in level if isinstance(text, str) and _SURROGATE.search(text)), None)
        if lone is not None:
            raise JSONFileError(f"half of a surrogate pair, which is not a character, in {lone[:80]!r}")
    return value


def levels(value: Any) -> Iterator[list[Any]]:
    """Walks a JSON value level by level, without recursion, which would fail for deeply nested values.

    Args:
      value: any JSON value.

    Yields:
      The values of each level, keys and values of objects among them.

    Raises:
      JSONFileError: there are more than 64 levels.
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
