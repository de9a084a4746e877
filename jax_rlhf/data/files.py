"""The rows of one file: JSON, CSV, parquet and Arrow, read piece by piece and no larger than their files let expect."""

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
_FIELD = 60  # bytes that Python takes for a text, its characters aside
_UNPACKED, _RATIO = 64 * 2**20, 100
"""A compressed or encoded file may become so many bytes, and so many times its size."""
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # memory is mapped for each
_BOM = b"\xef\xbb\xbf"

Numbered = Iterator[tuple[int, Any]]


def kind_of(file: Path) -> str | None:
    """What a file's name says that it holds.

    Args:
      file: its path.

    Returns:
      One of SUFFIXES (".jsonl" for "rows.JSONL.gz"); None where it is none of them.
    """
    suffix, compressed = file.suffix.lower(), False
    if suffix == ".gz":
        suffix, compressed = Path(file.stem).suffix.lower(), True
    return suffix if suffix in (TEXT_SUFFIXES if compressed else SUFFIXES) else None


def rows_of(file: Path, *, field: str | None = None, delimiter: str | None = None) -> Numbered:
    """The rows of a file.

    Args:
      file: of a name that `kind_of` knows.
      field: of a .json file that is an object, the key of its list; None = "data".
      delimiter: between the columns of a .csv or .tsv file; None = a comma, or a tab.

    Yields:
      (number of the line or row from 1, its content).

    Raises:
      DataError: it cannot be read, or what it stands for is far larger than itself; says where.
      OSError: it may not be read.
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
    """A gzip file, which ends with an error where it has become too large."""

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
        f"{file}: its {file.stat().st_size:,} bytes stand for more than {most:,}, or for a row of more than "
        f"{LONGEST_ROW:,}, which is not read. If that is meant, unpack it into .jsonl files."
    )


class _Budget:
    """Of what a compressed file's rows may take in Python; a plain one's own size bounds them."""

    def __init__(self, file: Path) -> None:
        packed = file.suffix.lower() == ".gz"
        self._file, self._most = file, _most_unpacked(file) if packed else None
        self._left = self._most

    def take(self, cost: int) -> None:
        """Raises DataError where it is used up."""
        if self._left is not None:
            self._left -= cost
            if self._left < 0 and self._most is not None:
                raise DataError(_too_large(self._file, self._most))


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    """Its bytes, unpacked, without a byte-order mark."""
    raw = _Unpacked(file, _most_unpacked(file)) if file.suffix.lower() == ".gz" else file.open("rb", buffering=0)
    with file_errors(file), io.BufferedReader(raw, 2**20) as stream:
        if stream.peek(len(_BOM))[: len(_BOM)] == _BOM:
            stream.read(len(_BOM))
        yield stream


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    with _opened(file) as stream:
        number = 0
        while line := stream.readline(LONGEST_ROW + 1):  # not splitlines: U+2028 may stand inside a string
            number += 1
            if len(line) > LONGEST_ROW:
                raise DataError(f"{file}, line {number}: it has more than {LONGEST_ROW:,} bytes; divide it.")
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
    """A list of rows, an object with one, or a row per line, as some write it."""
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
        raise DataError(f"{file}: a list of objects is expected, this is a {type(value).__name__}.")
    for number, row in enumerate(value, 1):
        if long and len(json.dumps(row, ensure_ascii=False)) > LONGEST_ROW:
            raise DataError(f"{file}, row {number}: it has more than {LONGEST_ROW:,} characters; divide it.")
        yield number, row


def _csv(file: Path, delimiter: str) -> Numbered:
    csv.field_size_limit(LONGEST_ROW)  # Python's own is 131,072
    number, budget = 0, _Budget(file)
    with _opened(file) as stream, io.TextIOWrapper(stream, encoding="utf-8", newline="") as text:
        try:
            reader = csv.DictReader(text, strict=True, delimiter=delimiter)
            for number, content in enumerate(reader, 1):
                if None in content or None in content.values():
                    raise DataError(
                        f"{file}, row {number}: {len(reader.fieldnames or ())} columns are named in the first line, "
                        "this row has another number."
                    )
                size = sum(map(len, content.values()))
                if size > LONGEST_ROW:
                    raise DataError(f"{file}, row {number}: it has more than {LONGEST_ROW:,} characters; divide it.")
                budget.take(ROW + size + _FIELD * len(content))
                yield number, content
        except csv.Error as error:
            raise DataError(f"{file}, after row {number}: not CSV ({error}).") from error
        except UnicodeDecodeError as error:
            for _ in _lines(file):  # which names the line
                pass
            raise DataError(f"{file}, after row {number}: not UTF-8; save the file as UTF-8.") from error


# ---- columns -------------------------------------------------------------------------------------------------------


def _columns(file: Path, kind: str) -> Numbered:
    """The rows of a parquet or Arrow file, decoded by a process of its own."""
    size, most = file.stat().st_size, _most_unpacked(file)
    with file.open("rb"):  # who may not read it is told so
        pass
    command = [sys.executable, "-P", decode_arrow.__file__, kind, str(file.absolute()), str(most), str(size)]
    how = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "env": os.environ | _ONE_THREAD}
    with tempfile.TemporaryFile() as said, subprocess.Popen(command, stderr=said, **how) as process:
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
            process.stdout.close()  # it may have more to say, and would wait
            code = process.wait()
        finally:
            process.kill()
        said.seek(0)
        reason = said.read()[-500:].decode(errors="replace").strip()
    if code == decode_arrow.TOO_LARGE or code < 0:  # a signal: of the limit of time, or pyarrow's end
        raise DataError(_too_large(file, most))
    if code == decode_arrow.BAD_ROW:
        row, _, reason = reason.partition(" ")
        raise DataError(f"{file}, row {row}: a value that cannot be read ({reason}).")
    if code or broken is not None:
        raise DataError(
            f"{file}: not a{'n Arrow' if kind == 'arrow' else ' parquet'} file that can be read ({reason or broken})."
        )


def _batches(stream: BinaryIO) -> Iterable[pyarrow.RecordBatch | Exception]:
    """What the process writes; the error where that ends early, of which its exit code may know more."""
    try:
        yield from pyarrow.ipc.open_stream(stream)
    except (pyarrow.ArrowException, EOFError, OSError) as error:
        yield error


def _arrow_rows(batch: pyarrow.RecordBatch, first: int, file: Path) -> list[dict[str, Any]]:
    """Rows as dicts; where one cannot be read (a text that is not UTF-8, a year past 9999), it is named."""
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
    """Values of Arrow's JSON type, which are texts, as what they say."""
    if value is None or not _holds_json(kind):
        return value
    if isinstance(kind, pyarrow.JsonType):
        return json.loads(value)
    if isinstance(value, dict):
        return {name: _with_json(inner, kind.field(name).type) for name, inner in value.items()}
    return [_with_json(inner, kind.field(0).type) for inner in value]


def without_fill(value: Any) -> Any:
    """A row without the keys that are None in what columns hold: Arrow gives each object of a column the keys of all.

    Args:
      value: a row.

    Returns:
      The row; what is no dict is left as it is.
    """
    if isinstance(value, dict):
        return {key: _without_nones(inner) for key, inner in value.items()}
    return value


def _without_nones(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nones(inner) for key, inner in value.items() if inner is not None}
    return [_without_nones(inner) for inner in value] if isinstance(value, list) else value
