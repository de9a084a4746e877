"""Writes files so that after a crash or power failure either the old file or the complete new file is there."""

import contextlib
import errno
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_RUST_ERROR = re.compile(r"\(os error (\d+)\)")  # in messages of Rust's standard library
_NOT_FOR_FOLDERS = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)  # errors of file systems that cannot sync a folder


@contextlib.contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Adds the path to errors of reading and writing a file, and converts them to OSError.

    Python's errors of `read` and `write` do not name the file. safetensors and tokenizers raise their own types, or
    bare Exception, and only the message says that, for example, the disk was full.

    Args:
      path: the file that is read or written.

    Raises:
      OSError: the file could not be read or written; it has the error number and a path.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    except Exception as error:
        number = _RUST_ERROR.search(str(error))
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(path)) from error


def sync(path: Path) -> None:
    """Flushes a file's content, or a folder's entries, to disk.

    Raises:
      OSError: the disk fails.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        with file_errors(path):
            os.fsync(handle)
    except OSError as error:
        if error.errno not in _NOT_FOR_FOLDERS or not path.is_dir():
            raise
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Flushes a local folder to disk, with everything in it and its entry in the parent folder.

    Raises:
      OSError: the disk fails.
    """
    for parent, _, files in os.walk(folder):
        for name in files:
            sync(Path(parent, name))
        sync(Path(parent))
    sync(folder.parent)


def write_text(file: Path, text: str) -> None:
    """Writes a file atomically, and flushes it to disk.

    Args:
      file: the file to make or replace, in an existing folder.
      text: its content.

    Raises:
      OSError: the disk is full, …; an old file is unchanged.
    """
    partial = file.with_name(f"{file.name}.partial")
    with file_errors(file):
        partial.write_text(text, encoding="utf-8")
    sync(partial)
    partial.replace(file)
    sync(file.parent)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object with sorted keys like `write_text`.

    Raises:
      OSError: as for `write_text`.
    """
    write_text(file, json.dumps(content, indent=2, sort_keys=True) + "\n")
