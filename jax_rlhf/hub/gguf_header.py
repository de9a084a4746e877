"""Whether the header of a GGUF file can be true, before the gguf package takes memory for what it claims.

The package reads on past the end of a file: an array that claims 2⁴⁰ texts takes memory until there is none.
"""

import os
import struct
from pathlib import Path
from typing import BinaryIO

_STRING, _ARRAY = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of a value, in bytes, by its type
_MAX_DIMENSIONS, _MAX_DEPTH = 4, 2  # ggml's, and arrays in arrays
_MAX_FIELDS, _MAX_TENSORS = 10_000, 10_000  # of which real files have a hundred, and a thousand
_MAX_ENTRIES = 1_500_000  # of all arrays; a vocabulary of 262,144 with merges and types has 1.04 million


def check_header(file: Path) -> None:
    """Walks through the fields and the tensors' descriptions, each of which must lie in the file.

    The package makes several objects of an array's entry, 1.6 kB, so that these are counted too.

    Args:
      file: a GGUF file of version 2 or 3, little-endian.

    Raises:
      ValueError: it is none, claims more than it has, or has more than a tokenizer needs.

    Source: the GGUF specification, ggml-org/ggml, docs/gguf.md.
    """
    with file.open("rb") as stream:
        left = os.fstat(stream.fileno()).st_size
        magic, version, tensors, fields = _numbers(stream, "<4sIQQ")
        if magic != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        if version not in (2, 3):
            raise ValueError(f"version {version}, or big-endian; 2 and 3 are read, little-endian")
        if fields * 13 > left or tensors * 25 > left:  # the least that one takes
            raise ValueError(f"it claims {fields} fields and {tensors} tensors, and has {left} bytes")
        if fields > _MAX_FIELDS or tensors > _MAX_TENSORS:
            raise ValueError(
                f"it has {fields:,} fields and {tensors:,} tensors; {_MAX_FIELDS:,} and {_MAX_TENSORS:,} are read"
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
            _skip(stream, left, dimensions * 8 + 4 + 8)  # sizes, type, place


def _numbers(stream: BinaryIO, form: str) -> tuple:
    return struct.unpack(form, stream.read(struct.calcsize(form)))  # struct.error where the file ends


def _skip(stream: BinaryIO, end: int, size: int) -> None:
    if stream.tell() + size > end:
        raise ValueError(f"at byte {stream.tell()} it claims {size} bytes more than it has")
    stream.seek(size, os.SEEK_CUR)


def _skip_text(stream: BinaryIO, end: int) -> None:
    _skip(stream, end, *_numbers(stream, "<Q"))


def _skip_value(stream: BinaryIO, end: int, room: int, kind: int, depth: int = 0) -> int:
    """Returns for how many more entries of arrays there is room."""
    if kind == _STRING:
        _skip_text(stream, end)
    elif kind in _SIZES:
        _skip(stream, end, _SIZES[kind])
    elif kind == _ARRAY and depth < _MAX_DEPTH:
        inner, count = _numbers(stream, "<IQ")
        room -= count
        if room < 0:
            raise ValueError(f"an array claims {count:,} entries; all together may have {_MAX_ENTRIES:,}")
        if inner in _SIZES:
            _skip(stream, end, count * _SIZES[inner])
        else:
            for _ in range(count):
                room = _skip_value(stream, end, room, inner, depth + 1)
    else:
        raise ValueError(f"a field of the type {kind}")
    return room
