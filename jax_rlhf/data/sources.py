"""Reads rows from files, Hugging Face data sets and Python readers; each row knows its file and line."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import lazy_loader

from jax_rlhf.data.data_error import DataError
from jax_rlhf.data.files import SUFFIXES, kind_of, rows_of, without_fill
from jax_rlhf.data.folders import rows_of_folder
from jax_rlhf.io.import_function import FORMS, NotAFunctionError, import_function, is_function_name
from jax_rlhf.io.json_files import JSONFileError, levels
from jax_rlhf.io.paths import local_path

datasets: Any = lazy_loader.load("datasets")  # importing it takes 0.5 s

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+(:[\w./-]+)?)?")


@dataclasses.dataclass(frozen=True)
class Row:
    """A row as it was read.

    Attributes:
      content: column → value.
      source: the file, data set or reader.
      number: the line or row in the source, from 1.
    """

    content: dict[str, Any]
    source: str
    number: int

    @property
    def where(self) -> str:
        """The source and line or row, for error messages."""
        return f"{self.source}, {'line' if self.source.endswith(('.jsonl', '.jsonl.gz')) else 'row'} {self.number}"


def read_rows(path: str, *, phase: str, split: str, hub_split: str, revision: str | None = None) -> list[Row]:
    """All rows of a source.

    Args:
      path: a file; a Hugging Face data set's id ("org/name", "org/name:configuration") or folder, also one that
        `save_to_disk` wrote; or a reader, "package.module:function" or
        "FILE.py:function".
      phase: the phase that is passed to a reader.
      split: "train" or "eval", the split that is passed to a reader.
      hub_split: the split of a Hugging Face data set.
      revision: the revision of a Hugging Face data set.

    Returns:
      The rows, at least one.

    Raises:
      FileNotFoundError: the path is neither a file or folder, nor an id, nor a reader.
      DataError: the source is invalid; the message says where.
    """
    file = local_path(path)
    numbered: Iterable[tuple[Any, int, Any]]
    if is_reader(path):
        numbered = ((path, number, row) for number, row in enumerate(_from_reader(path, phase, split), 1))
    elif file.is_file():
        if kind_of(file) is None:
            raise DataError(
                f"{path}: the name of a data file must end with one of {', '.join(SUFFIXES)}, all but the last two "
                "optionally with .gz after it; rename the file by its format."
            )
        numbered = ((path, number, row) for number, row in rows_of(file))
    elif file.is_dir():
        numbered = rows_of_folder(file, hub_split)
    elif _HUB_ID.fullmatch(path) and kind_of(file) is None:
        numbered = ((path, number, row) for number, row in enumerate(_from_hub(path, hub_split, revision), 1))
    else:
        raise FileNotFoundError(
            f"config.data: {path!r} is neither an existing file or folder, nor a Hugging Face id, nor a reader "
            f"({FORMS})."
        )
    rows = []
    for source, number, content in numbered:
        row = Row(content, str(source), number)
        if not isinstance(content, dict):
            raise DataError(
                f"{row.where}: a row must be an object of columns, and is a {type(content).__name__}: "
                f"{str(content)[:80]!r}."
            )
        try:
            for _ in levels(content):
                pass
        except JSONFileError as error:
            raise DataError(f"{row.where}: {error}.") from error
        rows.append(row)
    if not rows:
        raise DataError(f"{path}: it has no rows.")
    return rows


def is_reader(path: str) -> bool:
    """Whether a path of `read_rows` names a Python function."""
    return is_function_name(path) and not local_path(path).exists()


def imported(name: str, what: str) -> Callable:
    """Imports a function by its name.

    Args:
      name: "package.module:function" or "FILE.py:function".
      what: the setting that has the name, for error messages.

    Raises:
      ValueError: the name has another form, cannot be imported, or is not a function.
    """
    checked_name(name, what)
    try:
        return import_function(name)
    except (ImportError, AttributeError, SystemExit) as error:
        in_module = " Is the module's folder on PYTHONPATH? A file can be named by its path, FILE.py:function."
        advice = "" if ".py:" in name else in_module
        raise ValueError(f"{what}={name!r} cannot be imported: {str(error).rstrip('.')}.{advice}") from error
    except NotAFunctionError as error:
        raise ValueError(f"{what}={name!r}: {error}.") from error


def checked_name(name: str, what: str) -> str:
    """Checks the form of a function's name, without importing it, and returns it.

    Args:
      name: "package.module:function" or "FILE.py:function".
      what: the setting that has the name, for error messages.

    Raises:
      ValueError: the name has another form.
    """
    if not is_function_name(name):
        raise ValueError(f"{what}={name!r} must be of the form {FORMS}.")
    return name


def _from_reader(path: str, phase: str, split: str) -> list:
    try:
        reader = imported(path, "config.data.paths")
    except ValueError as error:
        raise ValueError(f"{error} (A configuration of a data set is written org/name:configuration.)") from error
    rows = reader(phase=phase, split=split)
    if not isinstance(rows, Iterable):
        raise DataError(f"reader {path} returned a {type(rows).__name__}; it must return an iterable of dicts.")
    return list(rows)


def _from_hub(path: str, split: str, revision: str | None) -> Iterator[dict]:
    """The rows of "org/name", "org/name:configuration" or "org/name:folder"."""
    try:
        # Read all rows inside this `try`: a column of audio or images fails only when it is decoded.
        return iter([without_fill(row) for row in _load_dataset(path, split, revision)])
    except DataError:
        raise
    except Exception as error:  # datasets raises many types
        raise DataError(
            f"Hugging Face data set {path!r}, split {split!r}: {type(error).__name__}: {error}. Choose a split with "
            "config.data.split and config.data.eval_split, and a configuration or a folder of a data set with the path "
            "org/name:configuration. Without a network use a local file, or a folder written by save_to_disk."
        ) from error


def _load_dataset(path: str, split: str, revision: str | None) -> Iterable[dict]:
    name, colon, part = path.partition(":")
    keywords: dict[str, Any] = {"name": part} if colon else {}
    try:
        builder = datasets.load_dataset_builder(name, revision=revision, **keywords)
    except ValueError as error:  # not a configuration but a folder, such as Anthropic/hh-rlhf:harmless-base
        if not colon or "BuilderConfig" not in str(error):
            raise
        keywords = {"data_dir": part}
        builder = datasets.load_dataset_builder(name, revision=revision, **keywords)
    _check_own_files(builder, name)
    return datasets.load_dataset(name, split=split, revision=revision, **keywords)


def _check_own_files(builder: Any, name: str) -> None:
    """Raises if a data set's card names files outside of the data set: on this machine, or at another URL."""
    own = f"hf://datasets/{name}@".lower()
    for files in (getattr(builder.config, "data_files", None) or {}).values():
        for file in files:
            if not str(file).lower().startswith(own):
                raise DataError(
                    f"Hugging Face data set {name!r}: its card names {str(file)[:200]!r}, which is not a file of the "
                    "data set."
                )
