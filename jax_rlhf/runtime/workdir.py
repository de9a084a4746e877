"""The folder of a run: its lock, the status of its phases, and what may be deleted."""

from collections.abc import Iterable
from pathlib import Path

from absl import logging
from filelock import BaseFileLock, FileLock, Timeout

from jax_rlhf.io.json_files import JSONFileError, read_object
from jax_rlhf.runtime.manifest import ManifestError, check_deletable
from jax_rlhf.runtime.remote import checkpoints_of

CONFIG_FILE = "config.json"
_LOCK = ".lock"


class WorkdirError(ValueError):
    """The workdir belongs to another run, or lacks what a phase needs; the message says what to do."""


def lock_workdir(workdir: Path) -> BaseFileLock:
    """Creates the workdir, and locks it against other runs until the lock is released or this process ends.

    Raises:
      WorkdirError: another run writes to the workdir, or it cannot be written.
    """
    lock = FileLock(workdir / _LOCK)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout as error:
        raise WorkdirError(
            f"{workdir}: another run writes to it (it has locked {workdir / _LOCK}). Wait for its end, or take "
            "another --workdir."
        ) from error
    except OSError as error:
        raise WorkdirError(
            f"{workdir} cannot be written ({error.strerror}); take another --workdir, or change its owner or mount."
        ) from error
    except NotImplementedError:
        logging.warning("%s is on a file system without locks: make sure that no other run writes to it.", workdir)
    return lock


def is_locked(workdir: Path) -> bool:
    """Whether a run on this machine writes to a workdir. It does not change the folder."""
    if not (workdir / _LOCK).exists():
        return False
    lock = FileLock(workdir / _LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return True
    except (OSError, NotImplementedError):  # no permission to write, or a file system without locks
        return False
    lock.release()
    return False


def check_shared(workdir: Path) -> None:
    """Checks that this process sees the files that process 0 writes to the workdir.

    Raises:
      WorkdirError: the workdir is not on a file system that the machines share.
    """
    if (workdir / CONFIG_FILE).is_file():
        return
    raise WorkdirError(
        f"{workdir} does not have the files that process 0 wrote there, but all processes write their parts of "
        "checkpoints to it: take a folder on a file system that all machines share, or a bucket (gs://)."
    )


def status(workdir: Path, phase: str) -> str:
    """The status of a phase in a workdir.

    Returns:
      "new", "finished", "interrupted" (it has a checkpoint to continue from), or "partial" (it has only a model).
    """
    folder = workdir / phase
    try:
        if read_object(folder / "summary.json").get("finished") is True:
            return "finished"
    except (FileNotFoundError, NotADirectoryError):
        pass
    except JSONFileError as error:
        logging.warning("%s: summary.json is damaged (%s); the phase does not count as finished.", folder, error)
    if any(path.name.isdigit() for path in folder.glob("checkpoints/*")):
        return "interrupted"
    return "partial" if (folder / "model").exists() else "new"


def check_overwrite(workdir: Path, phases: Iterable[str]) -> None:
    """Checks that --overwrite would delete only files that this program wrote.

    Args:
      workdir: the folder.
      phases: the phases to repeat.

    Raises:
      WorkdirError: the folder of a phase contains other files.
    """
    for phase in phases:
        try:
            check_deletable(workdir / phase, checkpoints_of(workdir / phase))
        except ManifestError as error:
            raise WorkdirError(
                f"--overwrite deletes only what this program wrote: {error}. Move it away, or take another --workdir."
            ) from error
