"""Rows from files, Hugging Face data sets and Python readers, each with where it stood."""

import csv
import dataclasses
import importlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet

from jax_rlhf.data.errors import DataError

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
_SAVED_TO_DISK = ("dataset_dict.json", "state.json")
_ROWS_AT_ONCE = 1024
_LONGEST_FIELD = 1 << 30
"""In characters; Python's own limit is 131,072."""
_READER = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+(:[\w./-]+)?)?")


@dataclasses.dataclass(frozen=True)
class Row:
    """A row as it was read.

    Attributes:
      content: column → value.
      source: the file, data set or reader.
      number: of its line or row, from 1.
    """

    content: dict[str, Any]
    source: str
    number: int

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.source}, {'line' if self.source.endswith('.jsonl') else 'row'} {self.number}"


def read_rows(path: str, *, phase: str, split: str, hub_split: str, revision: str | None = None) -> list[Row]:
    """All rows of a source.

    Args:
      path: a file; a Hugging Face data set's id ("org/name", "org/name:configuration") or folder, also one that
        `save_to_disk` wrote; or "package.module:function".
      phase: told to a reader.
      split: "train" or "eval", told to a reader.
      hub_split: of a Hugging Face data set.
      revision: of a Hugging Face data set.

    Returns:
      The rows, at least one.

    Raises:
      FileNotFoundError: there is nothing of that name.
      DataError: it cannot be read; says where.
    """
    file = Path(path).expanduser()
    if is_reader(path):
        numbered: Iterable = enumerate(_from_reader(path, phase, split), 1)
    elif file.is_file():
        if file.suffix.lower() not in SUFFIXES:
            raise DataError(f"{path}: files of {', '.join(SUFFIXES)} can be read; name it after what it holds.")
        readers = {".jsonl": _json_lines, ".json": _json, ".parquet": _parquet, ".csv": _csv}
        numbered = readers[file.suffix.lower()](file)
    elif file.is_dir() or (_HUB_ID.fullmatch(path) and file.suffix.lower() not in SUFFIXES):
        numbered = enumerate(_from_hub(path, hub_split, revision), 1)
    else:
        raise FileNotFoundError(
            f"config.data: {path!r} is no file or folder here, no Hugging Face id, and no reader "
            '("package.module:function").'
        )
    rows = []
    for number, content in numbered:
        if not isinstance(content, dict):
            raise DataError(
                f"{Row({}, path, number).where}: a row must be an object of columns, this is a "
                f"{type(content).__name__}: {str(content)[:80]!r}."
            )
        rows.append(Row(content, path, number))
    if not rows:
        raise DataError(f"{path}: there is not a single row.")
    return rows


def is_reader(path: str) -> bool:
    """Whether a path names a Python function.

    Args:
      path: as in `read_rows`.

    Returns:
      Whether.
    """
    return _READER.fullmatch(path) is not None and not Path(path).expanduser().exists()


def imported(name: str, what: str) -> Callable:
    """A function by its name.

    Args:
      name: "package.module:function".
      what: for messages.

    Returns:
      The function.

    Raises:
      ValueError: there is none of that name.
    """
    if not _READER.fullmatch(name):
        raise ValueError(f'{what}={name!r}: "package.module:function" is expected.')
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{what}={name!r} cannot be imported: {error}. Is its folder on PYTHONPATH?") from error
    if not callable(function):
        raise ValueError(f"{what}={name!r} is a {type(function).__name__}, not a function.")
    return function


def _from_reader(path: str, phase: str, split: str) -> list:
    try:
        reader = imported(path, "config.data.paths")
    except ValueError as error:
        raise ValueError(f"{error} (A configuration of a data set is written org/name:configuration.)") from error
    rows = reader(phase=phase, split=split)
    if not isinstance(rows, Iterable):
        raise DataError(f"reader {path} returned a {type(rows).__name__}; an iterable of dicts is expected.")
    return list(rows)


def _from_hub(path: str, split: str, revision: str | None) -> Iterator[dict]:
    """The rows of "org/name", "org/name:configuration", "org/name:folder", a local folder, or one of `save_to_disk`."""
    folder = Path(path).expanduser()
    try:
        if any((folder / name).is_file() for name in _SAVED_TO_DISK):
            saved = datasets.load_from_disk(str(folder))
            rows = saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        else:
            rows = _load_dataset(str(folder) if folder.is_dir() else path, split, revision)
        return iter([_without_fill(row) for row in rows])  # here: a column of sounds or images fails when it is read
    except Exception as error:  # datasets raises many types
        raise DataError(
            f"Hugging Face data set {path!r}, split {split!r}: {type(error).__name__}: {error}. A split is chosen with "
            "config.data.split and config.data.eval_split, a configuration or a folder of a data set by its path: "
            "org/name:configuration. Without a network give a local file, or a folder of save_to_disk."
        ) from error


def _load_dataset(path: str, split: str, revision: str | None) -> Iterable[dict]:
    name, colon, part = (path, "", "") if Path(path).is_dir() else path.partition(":")
    if not colon:
        return datasets.load_dataset(name, split=split, revision=revision)
    try:
        return datasets.load_dataset(name, part, split=split, revision=revision)
    except ValueError as error:  # no configuration of that name: Anthropic/hh-rlhf:harmless-base is a folder
        if "BuilderConfig" not in str(error):
            raise
        return datasets.load_dataset(name, data_dir=part, split=split, revision=revision)


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = file.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(f"{file}, line {line}: not UTF-8 ({error.reason}); save the file as UTF-8.") from error


def _json_lines(file: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(_text(file).split("\n"), 1):  # not splitlines: U+2028 may stand inside a string
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{file}, line {number}: not JSON ({error}): {line[:80]!r}") from error


def _json(file: Path) -> Iterator[tuple[int, Any]]:
    try:
        content = json.loads(_text(file))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{file}: not JSON ({error}). If it has an object a line, call it {file.with_suffix('.jsonl').name}."
        ) from error
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    if not isinstance(content, list):
        raise DataError(f"{file}: a list of objects is expected, this is a {type(content).__name__}.")
    return enumerate(content, 1)


def _parquet(file: Path) -> Iterator[tuple[int, Any]]:
    try:
        table = pyarrow.parquet.read_table(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a parquet file that can be read ({error}).") from error
    first = 1
    for batch in table.to_batches(max_chunksize=_ROWS_AT_ONCE):
        yield from enumerate(map(_without_fill, _arrow_rows(batch, first, file)), first)
        first += len(batch)


def _arrow_rows(batch: pyarrow.RecordBatch, first: int, file: Path) -> list[dict[str, Any]]:
    """Rows as dicts; where one cannot be read (a text that is not UTF-8, a year past 9999), it is named."""
    try:
        return batch.to_pylist()
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        if len(batch) == 1:
            raise DataError(f"{file}, row {first}: a value that cannot be read ({error}).") from error
    return [row for i in range(len(batch)) for row in _arrow_rows(batch.slice(i, 1), first + i, file)]


def _without_fill(value: Any) -> Any:
    """Without the keys that are None in what columns hold: Arrow gives each object of a column the keys of all."""
    if isinstance(value, dict):
        return {key: _without_nones(inner) for key, inner in value.items()}
    return value


def _without_nones(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nones(inner) for key, inner in value.items() if inner is not None}
    return [_without_nones(inner) for inner in value] if isinstance(value, list) else value


def _csv(file: Path) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.DictReader(io.StringIO(_text(file), newline=""), strict=True)
    number = 0
    try:
        for number, content in enumerate(reader, 1):
            if None in content or None in content.values():
                raise DataError(
                    f"{file}, row {number}: {len(reader.fieldnames)} columns are named in the first line, "
                    "this row has another number."
                )
            yield number, content
    except csv.Error as error:
        raise DataError(f"{file}, after row {number}: not CSV ({error}).") from error
