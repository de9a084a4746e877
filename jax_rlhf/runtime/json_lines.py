"""Finds where the complete lines of a JSON Lines file end, which a killed process or a power cut may have truncated."""

import hashlib
import json
import math
from typing import BinaryIO


def line_digest(line: bytes) -> str:
    """A checksum of a line, 16 hexadecimal digits; it shows later whether a file has changed before a position."""
    return hashlib.blake2b(line, digest_size=8).hexdigest()


def line_before(file: BinaryIO, end: int) -> bytes:
    """The line that ends at a position, with its line break if it has one; b"" at the start of the file.

    Args:
      file: open for reading.
      end: the position, in bytes.
    """
    start, line = end, b""
    while start > 0 and b"\n" not in line[:-1]:
        start = max(0, start - 2**16)
        file.seek(start)
        line = file.read(end - start)
    return line[line[:-1].rfind(b"\n") + 1 :]


def end_of_step(file: BinaryIO, step: int, *, evaluated: bool) -> int:
    """The position, in bytes, after the complete lines of all steps up to `step`.

    Args:
      file: open for reading; each line has its "step".
      step: the last step.
      evaluated: whether to include the lines of that step's evaluation.
    """
    file.seek(0)
    position = 0
    for line in file:
        try:
            content = json.loads(line) if line.endswith(b"\n") else {}
            found, evaluation = (
                content["step"],
                content.get("split") == "eval" or any("eval/" in name for name in content),
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            break
        if not isinstance(found, int) or found > step or (found == step and evaluation and not evaluated):
            break
        position += len(line)
    return position


def seconds_of(line: bytes) -> float:
    """Seconds from the start of the phase to a line of metrics; 0 if the line has no valid time."""
    try:
        seconds = float(json.loads(line)["seconds"])
        return seconds if math.isfinite(seconds) else 0.0
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return 0.0
