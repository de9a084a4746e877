"""Files that decide, written so that a crash or a power cut leaves the former one or the whole new one."""

import contextlib
import errno
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_RUST_ERROR = re.compile(r"\(os error (\d+)\)")  # in the text of what Rust's standard library says of a file
_NOT_FOR_FOLDERS = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)  # what file systems say that cannot sync a folder


@contextlib.contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Names the file where something cannot be read or written.

    Python's own error of a read or write does not say of which file. safetensors and tokenizers raise types of their
    own, or a bare Exception, of which only the text says that the disk was full.

    Args:
      path: what is read or written.

    Raises:
      OSError: it could not be; with its number, and a path.
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
    """Waits until a file's content, or a folder's entries, are on the disk.

    Args:
      path: a file or folder.

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
    """Waits until a folder, and all that is in it, is on the disk under its name.

    Args:
      folder: a local folder.

    Raises:
      OSError: the disk fails.
    """
    for parent, _, files in os.walk(folder):
        for name in files:
            sync(Path(parent, name))
        sync(Path(parent))
    sync(folder.parent)


def write_text(file: Path, text: str) -> None:
    """Writes a file as a whole, and waits until it is on the disk under its name.

    Args:
      file: to make or replace; its folder is there.
      text: its content.

    Raises:
      OSError: the disk is full, …; the former file is as it was.
    """
    partial = file.with_name(f"{file.name}.partial")
    with file_errors(file):
        partial.write_text(text, encoding="utf-8")
    sync(partial)
    partial.replace(file)
    sync(file.parent)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """The same with a JSON object, its keys sorted.

    Args:
      file: to make or replace.
      content: the object.

    Raises:
      OSError: as above.
    """
    write_text(file, json.dumps(content, indent=2, sort_keys=True) + "\n")
