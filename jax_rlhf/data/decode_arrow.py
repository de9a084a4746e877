"""A separate program: reads a parquet or Arrow file under a memory limit, and writes its rows as an Arrow stream.

A file of a few hundred bytes can decode to gigabytes: a dictionary with one long text that every row repeats, a text
that compresses to almost nothing, a billion rows of nulls. And a corrupt file can crash pyarrow's C++ code. Here such a
crash ends this process only. The program imports nothing but pyarrow, and `files.py` runs it by its path.
"""

import contextlib
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pyarrow
import pyarrow.compute
import pyarrow.ipc
import pyarrow.parquet
from pyarrow import types

_compute: Any = pyarrow.compute  # whose functions are made at run time

_ROWS_AT_ONCE = 256
ROW, _VALUE = 300, 16  # bytes of memory per row in Python, and at least per value
CONTAINERS, _CONTAINER = "[{", 64  # opening characters of JSON's containers, and bytes of memory per empty one
LONGEST_ROW = 64 * 2**20
"""The largest allowed size of a line in bytes, and of a field or row in characters."""
_BUFFER = 2**20
_OVERHEAD = 2**30
"""Bytes of address space for Python, pyarrow and one batch."""
_FILE = b"ARROW1"
"""Magic bytes of Arrow's file format. The stream format, which `datasets` writes, has none."""
TOO_LARGE, UNREADABLE, BAD_ROW = 3, 4, 5


def main(kind: str, path: str, budget: int, size: int) -> int:
    """Decodes a file to stdout.

    Args:
      kind: "parquet" or "arrow".
      path: the file.
      budget: bytes of memory that the decoded rows may use.
      size: of the file, in bytes.

    Returns:
      The exit code: 0, TOO_LARGE, UNREADABLE or BAD_ROW; an error is explained in one line on stderr.
    """
    for limit, most in (
        (resource.RLIMIT_AS, _mapped() + _OVERHEAD + 2 * size + budget),
        (resource.RLIMIT_CPU, 600 + size // 2**20),
    ):
        _, hard = resource.getrlimit(limit)
        with contextlib.suppress(ValueError, OSError):  # macOS has no limit of the address space
            resource.setrlimit(limit, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    pyarrow.set_memory_pool(pyarrow.system_memory_pool())
    try:
        schema, batches = _parquet(path) if kind == "parquet" else _arrow(path)
        with pyarrow.ipc.new_stream(sys.stdout.buffer, schema) as stream:
            first = 1
            for batch in batches:
                _check(batch, first)
                cost = len(batch) * ROW + sum(map(_cost, batch.columns))
                budget -= cost
                if budget < 0:
                    print("too large", file=sys.stderr)
                    return TOO_LARGE
                if cost > LONGEST_ROW:
                    _check_sizes(batch, first)
                first += len(batch)
                stream.write_batch(batch)
    except MemoryError:
        print("too large", file=sys.stderr)
        return TOO_LARGE
    except BrokenPipeError:
        return 0
    except _BadRowError as error:
        print(error, file=sys.stderr)
        return BAD_ROW
    except Exception as error:  # pyarrow raises many types; names of columns raise UnicodeDecodeError
        print(f"{type(error).__name__}: {error}".encode("ascii", "backslashreplace").decode(), file=sys.stderr)
        return UNREADABLE
    return 0


def _mapped() -> int:
    """Bytes of address space already in use: libraries map memory for each core of the machine."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:  # not Linux
        return 0


def _parquet(path: str) -> tuple[pyarrow.Schema, Iterator[pyarrow.RecordBatch]]:
    file = pyarrow.parquet.ParquetFile(path, buffer_size=_BUFFER)
    return file.schema_arrow, file.iter_batches(batch_size=_ROWS_AT_ONCE, use_threads=False)


def _arrow(path: str) -> tuple[pyarrow.Schema, Iterator[pyarrow.RecordBatch]]:
    source = pyarrow.OSFile(path)
    options = pyarrow.ipc.IpcReadOptions(use_threads=False)
    magic = source.read(len(_FILE))
    source.seek(0)
    if magic == _FILE:
        file = pyarrow.ipc.open_file(source, options=options)
        return file.schema, _slices(file.get_batch(index) for index in range(file.num_record_batches))
    stream = pyarrow.ipc.open_stream(source, options=options)
    return stream.schema, _slices(stream)


def _slices(batches: Iterator[pyarrow.RecordBatch]) -> Iterator[pyarrow.RecordBatch]:
    for batch in batches:
        batch.validate()  # slicing relies on valid offsets
        for first in range(0, len(batch), _ROWS_AT_ONCE):
            yield batch.slice(first, _ROWS_AT_ONCE)


class _BadRowError(Exception):
    """A row has an invalid value; the message begins with the row's number."""


def _check(batch: pyarrow.RecordBatch, first: int) -> None:
    """Raises for the first row with a text that is not UTF-8, or with offsets outside of their buffers.

    `first` is the number of the batch's first row.
    """
    try:
        batch.validate(full=True)
    except pyarrow.ArrowException as error:
        if len(batch) <= 1:
            raise _BadRowError(f"{first} {error}") from error
        for index in range(len(batch)):
            _check(batch.slice(index, 1), first + index)
        raise


def _check_sizes(batch: pyarrow.RecordBatch, first: int) -> None:
    """Raises for the first row that is too long; `first` is the number of the batch's first row."""
    for index in range(len(batch)):
        if sum(map(_cost, batch.slice(index, 1).columns)) > LONGEST_ROW:
            raise _BadRowError(f"{first + index} it has more than {LONGEST_ROW:,} bytes; split it")


def json_cost(text: str | bytes) -> int:
    """An estimate of the bytes of memory that a JSON text takes when it is parsed."""
    marks = [mark.encode() for mark in (*CONTAINERS, ",")] if isinstance(text, bytes) else [*CONTAINERS, ","]
    *containers, commas = map(cast(Any, text).count, marks)
    return len(text) + _CONTAINER * sum(containers) + _VALUE * commas


def _cost(array: pyarrow.Array) -> int:
    """An estimate of the bytes of memory that an array's values take as Python objects."""
    kind, cost = array.type, _VALUE * len(array)
    if isinstance(kind, pyarrow.JsonType):  # its texts are parsed later
        count = _compute.count_substring
        containers = sum(_sum(count(array.storage, mark)) for mark in CONTAINERS)
        return _cost(array.storage) + _CONTAINER * containers + _VALUE * _sum(count(array.storage, ","))
    if isinstance(array, pyarrow.ExtensionArray):
        return _cost(array.storage)
    if types.is_dictionary(kind):
        sizes = _sizes(array.dictionary)
        if sizes is not None:
            return cost + _sum(pyarrow.compute.take(sizes, array.indices))
        times = _compute.value_counts(array.indices.drop_null()).to_pylist()
        return cost + sum(one["counts"] * _cost(array.dictionary.slice(one["values"], 1)) for one in times)
    sizes = _sizes(array)
    if sizes is not None:
        return cost + _sum(sizes)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return cost + _cost(array.flatten())
    if types.is_map(kind):
        first, last = array.offsets[0].as_py(), array.offsets[-1].as_py()
        entries = (array.keys.slice(first, last - first), array.items.slice(first, last - first))
        return cost + _VALUE * len(entries[0]) + sum(map(_cost, entries))
    if types.is_struct(kind):
        return cost + sum(map(_cost, array.flatten()))
    if types.is_primitive(kind) or types.is_null(kind) or types.is_decimal(kind):
        return cost
    raise TypeError(f"a column of the type {kind} cannot be read")


def _sizes(array: pyarrow.Array) -> pyarrow.Array | None:
    """The size of each text in bytes; None if the values are not texts."""
    kind = array.type
    if types.is_string_view(kind) or types.is_binary_view(kind):
        array = array.cast(pyarrow.large_binary())
    elif types.is_nested(kind) or not any(
        is_one(kind)
        for is_one in (
            types.is_string,
            types.is_large_string,
            types.is_binary,
            types.is_large_binary,
            types.is_fixed_size_binary,
        )
    ):
        return None
    return _compute.binary_length(array)


def _sum(sizes: pyarrow.Array) -> int:
    return _compute.sum(sizes.cast(pyarrow.int64())).as_py() or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
