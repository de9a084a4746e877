"""Files of JSON lines, as a killed process or a power cut may leave them: where their whole lines end."""

import hashlib
import json
import math
from typing import BinaryIO


def line_digest(line: bytes) -> str:
    """A checksum of a line, by which it is known that a place in a file is still the same.

    Args:
      line: its bytes.

    Returns:
      16 hexadecimal digits.
    """
    return hashlib.blake2b(line, digest_size=8).hexdigest()


def line_before(file: BinaryIO, end: int) -> bytes:
    """The line that ends at a place.

    Args:
      file: open for reading.
      end: the place, in bytes.

    Returns:
      The line with its line break, or what stands there instead of one; b"" at the start.
    """
    start, line = end, b""
    while start > 0 and b"\n" not in line[:-1]:
        start = max(0, start - 2**16)
        file.seek(start)
        line = file.read(end - start)
    return line[line[:-1].rfind(b"\n") + 1 :]


def end_of_step(file: BinaryIO, step: int, *, evaluated: bool) -> int:
    """Where the whole lines of so many steps end: half a line, or the lines of a later step, come after it.

    Args:
      file: open for reading; each line has its "step".
      step: the last one.
      evaluated: the lines of that step's evaluation count too.

    Returns:
      The place, in bytes.
    """
    file.seek(0)
    place = 0
    for line in file:
        try:
            content = json.loads(line) if line.endswith(b"\n") else {}
            of, evaluation = content["step"], content.get("split") == "eval" or any("eval/" in name for name in content)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            break
        if not isinstance(of, int) or of > step or (of == step and evaluation and not evaluated):
            break
        place += len(line)
    return place


def seconds_of(line: bytes) -> float:
    """When a line of metrics was written.

    Args:
      line: its bytes.

    Returns:
      Seconds since the phase began; 0 where it does not say.
    """
    try:
        seconds = float(json.loads(line)["seconds"])
        return seconds if math.isfinite(seconds) else 0.0
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return 0.0
