"""Names of files that users, data and checkpoints give."""

import errno
from pathlib import Path

_LONGEST = 255  # bytes; what file systems allow


def is_name(text: str) -> bool:
    """Whether a text names a file in a folder, and leads nowhere else.

    Args:
      text: any text.

    Returns:
      Whether.
    """
    if text in ("", ".", "..") or not text.isprintable() or any(mark in text for mark in "/\\"):
        return False
    return len(text.encode()) <= _LONGEST


def local_path(path: str | Path) -> Path:
    """A path as the user wrote it, with the home folder for ~.

    Args:
      path: any text.

    Returns:
      The path, which may or may not exist.

    Raises:
      FileNotFoundError: there can be no such file: its name is too long, has a zero byte, or a home that nobody has.
      OSError: a folder on the way may not be read.
    """
    try:
        local = Path(path).expanduser()
        local.exists()
    except (RuntimeError, ValueError) as error:
        raise FileNotFoundError(f"{str(path)[:200]!r}: no file can be called so ({error}).") from error
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise FileNotFoundError(f"{str(path)[:200]!r}: no file can be called so (its name is too long).") from error
    return local
