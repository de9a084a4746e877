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
        entries = 0
        for _ in range(fields):
            _skip_text(stream, left)
            entries += _skip_value(stream, left, *_numbers(stream, "<I"))
            if entries > _MAX_ENTRIES:
                raise ValueError(f"its arrays have more than {_MAX_ENTRIES:,} entries")
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


def _skip_value(stream: BinaryIO, end: int, kind: int, depth: int = 0) -> int:
    """Returns how many entries of arrays there were."""
    if kind == _STRING:
        _skip_text(stream, end)
    elif kind in _SIZES:
        _skip(stream, end, _SIZES[kind])
    elif kind == _ARRAY and depth < _MAX_DEPTH:
        inner, count = _numbers(stream, "<IQ")
        if inner in _SIZES:
            _skip(stream, end, count * _SIZES[inner])
            return count
        if count * 8 > end:  # a text or an array has its length, at least
            raise ValueError(f"an array claims {count} entries")
        return count + sum(_skip_value(stream, end, inner, depth + 1) for _ in range(count))
    else:
        raise ValueError(f"a field of the type {kind}")
    return 0
