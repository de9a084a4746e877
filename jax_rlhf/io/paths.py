"""Names of files that users, data and checkpoints give."""

import errno
from pathlib import Path

_LONGEST = 255  # bytes; what file systems allow
_CACHED = ("datasets--", "models--", "spaces--")  # folders of huggingface_hub's cache begin so


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


def lies_within(folder: Path, file: Path) -> bool:
    """Whether a file is a folder's own: not a link that leads out of it.

    Args:
      folder: with the files of somebody else; one of huggingface_hub's cache has links into the blobs beside it.
      file: in it, or named by one of its files.

    Returns:
      Whether.
    """
    root, repository = folder.resolve(), folder.resolve().parent.parent
    roots = [root]
    if root.parent.name == "snapshots" and repository.name.startswith(_CACHED):
        roots.append(repository / "blobs")
    return any(file.resolve().is_relative_to(one) for one in roots)
