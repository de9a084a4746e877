"""Checks paths and file names that come from users, data and checkpoints."""

import errno
from pathlib import Path

_LONGEST = 255  # bytes; the longest name that file systems allow
_CACHED = ("datasets--", "models--", "spaces--")  # prefixes of folders in huggingface_hub's cache


def is_name(text: str) -> bool:
    """Whether a text is a plain file name, which cannot lead out of a folder."""
    if text in ("", ".", "..") or not text.isprintable() or any(mark in text for mark in "/\\"):
        return False
    return len(text.encode()) <= _LONGEST


def local_path(path: str | Path) -> Path:
    """A path that the user wrote, with ~ expanded; it need not exist.

    Raises:
      FileNotFoundError: the path is invalid: a name is too long, has a zero byte, or the home folder does not exist.
      OSError: there is no permission for a folder of the path.
    """
    try:
        local = Path(path).expanduser()
        local.exists()
    except (RuntimeError, ValueError) as error:
        raise FileNotFoundError(f"{str(path)[:200]!r}: it is not a valid path ({error}).") from error
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise FileNotFoundError(f"{str(path)[:200]!r}: it is not a valid path (a name is too long).") from error
    return local


def lies_within(folder: Path, file: Path) -> bool:
    """Whether a file lies within a folder after symbolic links are resolved.

    Args:
      folder: an untrusted folder. Folders in huggingface_hub's cache may have links to the blobs of the same
        repository.
      file: a file in the folder, or one that a file of the folder names.
    """
    root, repository = folder.resolve(), folder.resolve().parent.parent
    roots = [root]
    if root.parent.name == "snapshots" and repository.name.startswith(_CACHED):
        roots.append(repository / "blobs")
    return any(file.resolve().is_relative_to(one) for one in roots)
