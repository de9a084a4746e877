"""Reads the rows of one JSON, CSV, parquet or Arrow file, with limits on what a file may expand to in memory."""

import contextlib
import csv
import gzip
import io
import json
import os
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow
import pyarrow.ipc

from jax_rlhf.data import decode_arrow
from jax_rlhf.data.data_error import DataError
from jax_rlhf.data.decode_arrow import LONGEST_ROW, ROW, json_cost
from jax_rlhf.io.durable import file_errors

TEXT_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
SUFFIXES = (*TEXT_SUFFIXES, ".parquet", ".arrow")
_FIELD = 60  # bytes of memory per string in Python, in addition to its characters
_UNPACKED, _RATIO = 64 * 2**20, 100
"""A compressed or encoded file may expand to so many bytes plus so many times its size."""
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # each thread would map memory
_BOM = b"\xef\xbb\xbf"

Numbered = Iterator[tuple[int, Any]]


def kind_of(file: Path) -> str | None:
    """The format of a file by its name: one of SUFFIXES (".jsonl" for "rows.JSONL.gz"), or None."""
    suffix, compressed = file.suffix.lower(), False
    if suffix == ".gz":
        suffix, compressed = Path(file.stem).suffix.lower(), True
    return suffix if suffix in (TEXT_SUFFIXES if compressed else SUFFIXES) else None


def rows_of(file: Path, *, field: str | None = None, delimiter: str | None = None) -> Numbered:
    """The rows of a file.

    Args:
      file: its path, with a name that `kind_of` recognizes.
      field: for a .json file that is an object, the key of the list of rows; None = "data".
      delimiter: separates the columns of a .csv or .tsv file; None = a comma, or a tab.

    Yields:
      (number of the line or row from 1, its content).

    Raises:
      DataError: the file is invalid, or expands to far more than its size; the message says where.
      OSError: the file cannot be opened.
    """
    match kind_of(file):
        case ".jsonl":
            return _json_lines(file)
        case ".json":
            return _json(file, field or "data")
        case ".csv":
            return _csv(file, delimiter or ",")
        case ".tsv":
            return _csv(file, delimiter or "\t")
        case ".parquet":
            return _columns(file, "parquet")
    return _columns(file, "arrow")


# ---- texts ---------------------------------------------------------------------------------------------------------


class _Unpacked(io.RawIOBase):
    """A gzip file as a stream; DataError if it expands to more than `most` bytes."""

    def __init__(self, file: Path, most: int) -> None:
        self._stream = gzip.GzipFile(file)
        self._left, self._file, self._most = most, file, most

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            piece = self._stream.read(len(buffer))
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{self._file}: not a whole gzip file ({error}); copy or download it again.") from error
        self._left -= len(piece)
        if self._left < 0:
            raise DataError(_too_large(self._file, self._most))
        buffer[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        self._stream.close()
        super().close()


def _most_unpacked(file: Path) -> int:
    return _UNPACKED + _RATIO * file.stat().st_size


def _too_large(file: Path, most: int) -> str:
    return (
        f"{file}: its {file.stat().st_size:,} bytes expand to more than {most:,}, or to a row of more than "
        f"{LONGEST_ROW:,}, which is not read. If the file is as intended, unpack it into .jsonl files."
    )


class _Budget:
    """The memory that a compressed file's rows may use in Python; a plain file is bounded by its own size."""

    def __init__(self, file: Path) -> None:
        packed = file.suffix.lower() == ".gz"
        self._file, self._most = file, _most_unpacked(file) if packed else None
        self._left = self._most

    def take(self, cost: int) -> None:
        """Subtracts bytes from the budget; DataError if it is exhausted."""
        if self._left is not None:
            self._left -= cost
            if self._left < 0 and self._most is not None:
                raise DataError(_too_large(self._file, self._most))


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    """The file's bytes as a stream, decompressed and without a byte-order mark."""
    raw = _Unpacked(file, _most_unpacked(file)) if file.suffix.lower() == ".gz" else file.open("rb", buffering=0)
    with file_errors(file), io.BufferedReader(raw, 2**20) as stream:
        if stream.peek(len(_BOM))[: len(_BOM)] == _BOM:
            stream.read(len(_BOM))
        yield stream


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    with _opened(file) as stream:
        number = 0
        while line := stream.readline(LONGEST_ROW + 1):  # not splitlines: a JSON string may contain U+2028
            number += 1
            if len(line) > LONGEST_ROW:
                raise DataError(f"{file}, line {number}: it has more than {LONGEST_ROW:,} bytes; split it.")
            try:
                yield number, line.decode()
            except UnicodeDecodeError as error:
                raise _not_utf8(file, number, error) from error


def _not_utf8(file: Path, line: int, error: UnicodeDecodeError) -> DataError:
    return DataError(f"{file}, line {line}: not UTF-8 ({error.reason}); save the file as UTF-8.")


def _json_lines(file: Path) -> Numbered:
    budget = _Budget(file)
    for number, line in _lines(file):
        if line.strip():
            budget.take(ROW + json_cost(line))
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{file}, line {number}: not JSON ({error}): {line[:80]!r}") from error


def _json(file: Path, field: str) -> Numbered:
    """A list of rows, an object that contains one, a single row, or JSON lines in a file named .json."""
    with _opened(file) as stream:
        content = stream.read()
    _Budget(file).take(json_cost(content))
    try:
        value = json.loads(content.decode())
    except UnicodeDecodeError as error:
        raise _not_utf8(file, content[: error.start].count(b"\n") + 1, error) from error
    except (ValueError, RecursionError) as error:
        if str(error).startswith("Extra data"):
            yield from _json_lines(file)
            return
        raise DataError(f"{file}: not JSON ({error}).") from error
    long = len(content) > LONGEST_ROW
    del content
    if isinstance(value, dict) and isinstance(value.get(field), list):
        value = value[field]
    if isinstance(value, dict) and field == "data":
        value = [value]  # one row
    if not isinstance(value, list):
        raise DataError(f"{file}: the file must contain a list of objects, and contains a {type(value).__name__}.")
    for number, row in enumerate(value, 1):
        if long and len(json.dumps(row, ensure_ascii=False)) > LONGEST_ROW:
            raise DataError(f"{file}, row {number}: it has more than {LONGEST_ROW:,} characters; split it.")
        yield number, row


def _csv(file: Path, delimiter: str) -> Numbered:
    csv.field_size_limit(LONGEST_ROW)  # Python's default is 131,072
    number, budget = 0, _Budget(file)
    with _opened(file) as stream, io.TextIOWrapper(stream, encoding="utf-8", newline="") as text:
        try:
            reader = csv.DictReader(text, strict=True, delimiter=delimiter)
            for number, content in enumerate(reader, 1):
                if None in content or None in content.values():
                    raise DataError(
                        f"{file}, row {number}: the first line names {len(reader.fieldnames or ())} columns, but this "
                        "row has a different number of fields."
                    )
                size = sum(map(len, content.values()))
                if size > LONGEST_ROW:
                    raise DataError(f"{file}, row {number}: it has more than {LONGEST_ROW:,} characters; split it.")
                budget.take(ROW + size + _FIELD * len(content))
                yield number, content
        except csv.Error as error:
            raise DataError(f"{file}, after row {number}: not CSV ({error}).") from error
        except UnicodeDecodeError as error:
            for _ in _lines(file):  # raises an error that names the line
                pass
            raise DataError(f"{file}, after row {number}: not UTF-8; save the file as UTF-8.") from error


# ---- columns -------------------------------------------------------------------------------------------------------


def _columns(file: Path, kind: str) -> Numbered:
    """The rows of a parquet or Arrow file, decoded in a separate process."""
    size, most = file.stat().st_size, _most_unpacked(file)
    with file.open("rb"):  # raises OSError here if the file cannot be opened
        pass
    command = [sys.executable, "-P", decode_arrow.__file__, kind, str(file.absolute()), str(most), str(size)]
    keywords = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "env": os.environ | _ONE_THREAD}
    with tempfile.TemporaryFile() as stderr, subprocess.Popen(command, stderr=stderr, **keywords) as process:
        broken = None
        try:
            first = 1
            assert process.stdout is not None
            for batch in _batches(cast(BinaryIO, process.stdout)):
                if isinstance(batch, Exception):
                    broken = batch
                    break
                yield from enumerate(_arrow_rows(batch, first, file), first)
                first += len(batch)
            process.stdout.close()  # otherwise the process might wait until its output is read
            code = process.wait()
        finally:
            process.kill()
        stderr.seek(0)
        reason = stderr.read()[-500:].decode(errors="replace").strip()
    if code == decode_arrow.TOO_LARGE or code < 0:  # a signal: the limit of CPU time, or a crash of pyarrow
        raise DataError(_too_large(file, most))
    if code == decode_arrow.BAD_ROW:
        row, _, reason = reason.partition(" ")
        raise DataError(f"{file}, row {row}: a value that cannot be read ({reason}).")
    if code or broken is not None:
        raise DataError(
            f"{file}: not a{'n Arrow' if kind == 'arrow' else ' parquet'} file that can be read ({reason or broken})."
        )


def _batches(stream: BinaryIO) -> Iterable[pyarrow.RecordBatch | Exception]:
    """The batches that the process writes. If the stream breaks off, the error is the last item, not raised.

    The exit code of the process may then explain the error better.
    """
    try:
        yield from pyarrow.ipc.open_stream(stream)
    except (pyarrow.ArrowException, EOFError, OSError) as error:
        yield error


def _arrow_rows(batch: pyarrow.RecordBatch, first: int, file: Path) -> list[dict[str, Any]]:
    """Rows as dicts; DataError with the row's number for an invalid value (not UTF-8, a year past 9999)."""
    try:
        rows = batch.to_pylist()
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        if len(batch) == 1:
            raise DataError(f"{file}, row {first}: a value that cannot be read ({error}).") from error
        return [row for i in range(len(batch)) for row in _arrow_rows(batch.slice(i, 1), first + i, file)]
    types = {field.name: field.type for field in batch.schema if _holds_json(field.type)}
    for index, row in enumerate(rows) if types else ():
        for name, kind in types.items():
            try:
                row[name] = _with_json(row[name], kind)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{file}, row {first + index}: column {name!r} is not JSON ({error}).") from error
    return [without_fill(row) for row in rows]


def _holds_json(kind: pyarrow.DataType) -> bool:
    return isinstance(kind, pyarrow.JsonType) or any(_holds_json(kind.field(i).type) for i in range(kind.num_fields))


def _with_json(value: Any, kind: pyarrow.DataType) -> Any:
    """Parses the values of Arrow's JSON type, which are stored as texts."""
    if value is None or not _holds_json(kind):
        return value
    if isinstance(kind, pyarrow.JsonType):
        return json.loads(value)
    if isinstance(value, dict):
        return {name: _with_json(inner, kind.field(name).type) for name, inner in value.items()}
    return [_with_json(inner, kind.field(0).type) for inner in value]


def without_fill(value: Any) -> Any:
    """Removes keys with the value None from the objects inside a row; a value that is not a dict is returned unchanged.

    Arrow gives each object of a column the keys of all objects of that column.
    """
    if isinstance(value, dict):
        return {key: _without_nones(inner) for key, inner in value.items()}
    return value


def _without_nones(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nones(inner) for key, inner in value.items() if inner is not None}
    return [_without_nones(inner) for inner in value] if isinstance(value, list) else value
