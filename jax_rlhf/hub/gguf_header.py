"""Checks the header of a GGUF file before the gguf package allocates memory for what the header claims.

The package reads past the end of a file: an array that claims 2⁴⁰ texts would use up all memory.
"""

import os
import struct
from pathlib import Path
from typing import BinaryIO

_STRING, _ARRAY = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # type → bytes per value
_MAX_DIMENSIONS, _MAX_DEPTH = 4, 2  # ggml's limit, and the depth of nested arrays
_MAX_FIELDS, _MAX_TENSORS = 10_000, 10_000  # real files have about a hundred, and a thousand
_MAX_ENTRIES = 1_500_000  # over all arrays; a vocabulary of 262,144 with merges and types has 1.04 million


def check_header(file: Path) -> None:
    """Checks that all fields and the descriptions of all tensors lie within the file.

    Entries of arrays are counted too, because the package makes several objects per entry, 1.6 kB.

    Args:
      file: a GGUF file of version 2 or 3, little-endian.

    Raises:
      ValueError: the file is not such a file, claims more than it contains, or has more entries than a tokenizer needs.

    Source: the GGUF specification, ggml-org/ggml, docs/gguf.md.
    """
    with file.open("rb") as stream:
        left = os.fstat(stream.fileno()).st_size
        magic, version, tensors, fields = _numbers(stream, "<4sIQQ")
        if magic != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        if version not in (2, 3):
            raise ValueError(f"version {version}, or big-endian; versions 2 and 3, little-endian, are supported")
        if fields * 13 > left or tensors * 25 > left:  # the smallest size of a field and of a tensor's description
            raise ValueError(f"it claims {fields} fields and {tensors} tensors, but has only {left} bytes")
        if fields > _MAX_FIELDS or tensors > _MAX_TENSORS:
            raise ValueError(
                f"it has {fields:,} fields and {tensors:,} tensors; at most {_MAX_FIELDS:,} and {_MAX_TENSORS:,} are "
                "supported"
            )
        room = _MAX_ENTRIES
        for _ in range(fields):
            _skip_text(stream, left)
            room = _skip_value(stream, left, room, *_numbers(stream, "<I"))
        for _ in range(tensors):
            _skip_text(stream, left)
            (dimensions,) = _numbers(stream, "<I")
            if dimensions > _MAX_DIMENSIONS:
                raise ValueError(f"a tensor claims {dimensions} dimensions")
            _skip(stream, left, dimensions * 8 + 4 + 8)  # sizes, type, offset


def _numbers(stream: BinaryIO, form: str) -> tuple:
    return struct.unpack(form, stream.read(struct.calcsize(form)))  # struct.error at the end of the file


def _skip(stream: BinaryIO, end: int, size: int) -> None:
    if stream.tell() + size > end:
        raise ValueError(f"at byte {stream.tell()} it claims {size} further bytes, which is beyond its end")
    stream.seek(size, os.SEEK_CUR)


def _skip_text(stream: BinaryIO, end: int) -> None:
    _skip(stream, end, *_numbers(stream, "<Q"))


def _skip_value(stream: BinaryIO, end: int, room: int, kind: int, depth: int = 0) -> int:
    """Skips a value; returns `room`, the number of array entries still allowed, less the entries of this value."""
    if kind == _STRING:
        _skip_text(stream, end)
    elif kind in _SIZES:
        _skip(stream, end, _SIZES[kind])
    elif kind == _ARRAY and depth < _MAX_DEPTH:
        inner, count = _numbers(stream, "<IQ")
        room -= count
        if room < 0:
            raise ValueError(f"an array claims {count:,} entries; all arrays together may have {_MAX_ENTRIES:,}")
        if inner in _SIZES:
            _skip(stream, end, count * _SIZES[inner])
        else:
            for _ in range(count):
                room = _skip_value(stream, end, room, inner, depth + 1)
    else:
        raise ValueError(f"a field has the unknown type {kind}")
    return room
