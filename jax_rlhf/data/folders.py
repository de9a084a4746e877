"""Reads the rows of a data set's folder: finds the files of a split, and reads only files inside the folder.

A folder's card (the YAML in its README.md) may name any file of the machine, and any URL. `datasets` would read it.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import huggingface_hub
import lazy_loader
import yaml

from jax_rlhf.data.data_error import DataError
from jax_rlhf.data.files import SUFFIXES, Numbered, kind_of, rows_of
from jax_rlhf.io.json_files import JSONFileError, read_object
from jax_rlhf.io.paths import is_name, lies_within

datasets: Any = lazy_loader.load("datasets")  # importing it takes 0.5 s

_CARDS = ("README.md", ".huggingface.yaml")
_MOST_CARD = 2**20
_DICT, _STATE = "dataset_dict.json", "state.json"
_KNOWN = {"config_name", "data_files", "data_dir", "default", "version", "description", "features", "drop_labels"}
_LONGEST_PATTERN, _STARS = 1000, 3  # characters of a pattern, and * per component of its path
_DELIMITERS = ("sep", "delimiter")
_CHOOSE = " Choose a split with config.data.split and config.data.eval_split."


def rows_of_folder(folder: Path, split: str) -> list[tuple[Path, int, Any]]:
    """The rows of a split.

    Args:
      folder: has files that `datasets` would load, or was written by `save_to_disk`.
      split: in the syntax of `datasets`: "train", "train[:100]", "train+test".

    Returns:
      (file, number of the line or row from 1, content) of each row.

    Raises:
      DataError: there is no such split, a file is invalid, or the folder refers to a file outside of it.
    """
    try:
        wanted = datasets.ReadInstruction.from_spec(split)
    except (AssertionError, ValueError, AttributeError) as error:
        raise DataError(f"config.data.split or eval_split: {split!r} is not a split: {error}") from error
    names = dict.fromkeys(part.partition("[")[0].strip() for part in split.split("+"))
    found = {name: list(_rows(folder, name)) for name in names}
    rows = []
    try:
        parts = wanted.to_absolute({name: len(content) for name, content in found.items()})
    except (AssertionError, ValueError) as error:
        raise DataError(f"{folder}: {split!r}: {error}") from error
    for part in parts:
        rows += found[part.splitname][part.from_ : part.to]
    return rows


def _rows(folder: Path, split: str) -> Iterator[tuple[Path, int, Any]]:
    if any((folder / name).is_file() for name in (_DICT, _STATE)):
        yield from _saved_rows(folder, split)
        return
    files, keywords = _files(folder, split)
    for file in files:
        yield from _with_file(file, rows_of(file, **keywords))


def _with_file(file: Path, numbered: Numbered) -> Iterator[tuple[Path, int, Any]]:
    return ((file, number, content) for number, content in numbered)


# ---- folders written by save_to_disk -------------------------------------------------------------------------------


def _saved_rows(folder: Path, split: str) -> Iterator[tuple[Path, int, Any]]:
    if (folder / _DICT).is_file():
        splits = _object(_own(folder, folder / _DICT)).get("splits")
        if not isinstance(splits, list) or split not in splits:
            raise DataError(f"{folder}: there is no split {split!r}; it has {str(splits)[:200]}.{_CHOOSE}")
        folder = _own(folder, folder / split)
    state = _object(_own(folder, folder / _STATE))
    files = state.get("_data_files")
    entries = files if isinstance(files, list) else [None]
    named = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries]
    names = [name for name in named if isinstance(name, str) and is_name(name)]
    if len(names) < len(named):
        raise DataError(
            f"{folder / _STATE}: its _data_files must name files in its folder; they are {str(files)[:200]}."
        )
    if state.get("_indices_data_files"):
        raise DataError(f"{folder}: it was saved by an old version of datasets; load and save it again.")
    columns = state.get("_format_columns")
    for name in names:
        if not (folder / name).is_file():
            raise DataError(f"{folder / name} is missing; copy the folder again, or save it again.")
        if kind_of(folder / name) != ".arrow":
            raise DataError(f"{folder / name}: it must be an .arrow file.")
        for file, number, content in _with_file(folder / name, rows_of(_own(folder, folder / name))):
            if isinstance(columns, list):
                content = {key: value for key, value in content.items() if key in columns}
            yield file, number, content


def _object(file: Path) -> dict[str, Any]:
    try:
        return read_object(file)
    except FileNotFoundError as error:
        raise DataError(f"{file} is missing; copy the folder again, or save it again.") from error
    except JSONFileError as error:
        raise DataError(f"{file}: {error}.") from error


# ---- folders that datasets would load ------------------------------------------------------------------------------


def _files(folder: Path, split: str) -> tuple[list[Path], dict[str, str]]:
    """(files of a split, keyword arguments of `rows_of`)."""
    patterns, base, keywords = _patterns(folder)
    if split not in patterns:
        raise DataError(f"{folder}: there is no split {split!r}; it has {', '.join(map(repr, patterns))}.{_CHOOSE}")
    found: dict[str, None] = {}
    for pattern in patterns[split]:
        _check_pattern(pattern, folder)
        with contextlib.suppress(FileNotFoundError):  # another of the patterns may match
            found |= dict.fromkeys(datasets.data_files.resolve_pattern(pattern, str(base)))
    if not found:
        raise DataError(f"{folder}: there are no files {' or '.join(map(repr, patterns[split]))} for {split!r}.")
    files = [_own(folder, Path(name)) for name in found]
    kinds = [kind for file in files if (kind := kind_of(file))]
    if not kinds:
        names = ", ".join(sorted(file.name for file in files)[:5])
        raise DataError(
            f"{folder}: none of the files of {split!r} can be read ({names}). Supported are {', '.join(SUFFIXES)}, and "
            "all but the last two with .gz after it."
        )
    # As datasets does: if there are several formats, take the one with the most files, parquet first.
    chosen = max(sorted(set(kinds)), key=lambda kind: (kinds.count(kind), kind == ".parquet", kind))
    return sorted(file for file in files if kind_of(file) == chosen), keywords


def _patterns(folder: Path) -> tuple[dict[str, list[str]], Path, dict[str, Any]]:
    """(split → patterns, the folder that they are relative to, keyword arguments of `rows_of`).

    They come from the card; without one the patterns come from the names of the files.
    """
    configuration = _configuration(folder)
    unknown = configuration.keys() - _KNOWN - {"field", *_DELIMITERS}
    if unknown:
        raise DataError(
            f"{folder}: its card sets {', '.join(sorted(map(str, unknown)))}, which is not supported; name the files "
            "themselves in config.data.paths."
        )
    keywords = {"field": configuration.get("field")}
    keywords["delimiter"] = next((configuration[name] for name in _DELIMITERS if name in configuration), None)
    if not all(isinstance(value, str | None) for value in keywords.values()) or len(keywords["delimiter"] or ",") != 1:
        raise DataError(f"{folder}: its card's field must be a name, and its delimiter one character.")
    inside, named = configuration.get("data_dir"), configuration.get("data_files")
    if inside is not None:
        _check_pattern(inside, folder)
    base = folder / (inside or "")
    if named is not None:
        return _as_patterns(named, folder), base, keywords
    try:
        return (
            {str(split): found for split, found in datasets.data_files.get_data_patterns(str(base.resolve())).items()},
            base,
            keywords,
        )
    except FileNotFoundError as error:
        raise DataError(f"{folder}: it has no files that can be read ({', '.join(SUFFIXES)}).") from error


def _as_patterns(named: Any, folder: Path) -> dict[str, list[str]]:
    """Split → patterns from a card's data_files: one pattern, several, or several per split."""
    entries = named if isinstance(named, list) else [named]
    if all(isinstance(entry, str) for entry in entries):
        return {"train": entries}
    patterns: dict[str, list[str]] = {}
    for entry in entries:
        split, path = (entry.get("split"), entry.get("path")) if isinstance(entry, dict) else (None, None)
        paths = path if isinstance(path, list) else [path]
        if not isinstance(split, str) or not all(isinstance(one, str) for one in paths):
            raise DataError(f"{folder}: its card's data_files must be patterns, or lists of split and path.")
        patterns.setdefault(split, []).extend(cast(list[str], paths))
    return patterns


def _configuration(folder: Path) -> dict[str, Any]:
    """The card's default configuration; {} if it has none."""
    configurations: list[Any] = []
    for name in _CARDS:
        file = folder / name
        if not file.is_file():
            continue
        _own(folder, file)
        if file.stat().st_size > _MOST_CARD:
            raise DataError(f"{file}: the card has more than {_MOST_CARD:,} bytes.")
        try:
            text = file.read_text(encoding="utf-8")
            content = (
                huggingface_hub.RepoCard(text, ignore_metadata_errors=False).data.to_dict()
                if name == _CARDS[0]
                else yaml.safe_load(text)
            )
        except (ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
            raise DataError(f"{file}: its YAML cannot be read: {str(error)[:200]}") from error
        found = content.get("configs") if isinstance(content, dict) else None
        configurations = found if isinstance(found, list) else configurations
    if not all(isinstance(one, dict) for one in configurations):
        raise DataError(f"{folder}: its card's configs must be a list of objects.")
    if len(configurations) < 2:
        return configurations[0] if configurations else {}
    chosen = [one for one in configurations if one.get("default") is True or one.get("config_name") == "default"]
    if len(chosen) != 1:
        named = [one.get("config_name") for one in configurations[:10]]
        names = ", ".join(name[:40] if isinstance(name, str) else "one without a name" for name in named)
        raise DataError(f"{folder}: its card has several configurations ({names}); name files in config.data.paths.")
    return chosen[0]


def _check_pattern(pattern: Any, folder: Path) -> None:
    path = Path(pattern) if isinstance(pattern, str) else None
    if (
        path is None
        or path.is_absolute()
        or ".." in path.parts
        or any(mark in pattern for mark in (":", "\\", "\0", "~"))
        or len(pattern) > _LONGEST_PATTERN
        or any(part.count("*") > _STARS and part != "**" for part in path.parts)  # each multiplies the time to match
    ):
        shown = repr(pattern[:200]) if path is not None else f"a {type(pattern).__name__}"
        raise DataError(
            f"{folder}: its card names {shown}, which is outside of the folder, or not a supported pattern; name files "
            "in config.data.paths."
        )


def _own(folder: Path, file: Path) -> Path:
    """The file; DataError if it is a symbolic link to a target outside of the folder."""
    if not lies_within(folder, file):
        raise DataError(
            f"{file} is a link to {file.resolve()}, which is not in the folder; name that file itself in "
            "config.data.paths."
        )
    return file
