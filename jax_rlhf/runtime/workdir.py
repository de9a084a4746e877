"""A run's folder: its lock, how far its phases are, and what of it may be deleted."""

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
    """The workdir is not this run's, or lacks what a phase needs; the message says how to mend it."""


def lock_workdir(workdir: Path) -> BaseFileLock:
    """Keeps other runs out of the workdir, as long as this process lives.

    Args:
      workdir: the folder; is made.

    Returns:
      The lock.

    Raises:
      WorkdirError: another run writes to it.
    """
    lock = FileLock(workdir / _LOCK)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout as error:
        raise WorkdirError(
            f"{workdir}: another run writes to it (it holds {workdir / _LOCK}). Wait for its end, or take another "
            "--workdir."
        ) from error
    except OSError as error:
        raise WorkdirError(
            f"{workdir} cannot be written ({error.strerror}); take another --workdir, or change its owner or its mount."
        ) from error
    except NotImplementedError:
        logging.warning("%s is on a file system without locks: see to it that no other run writes to it.", workdir)
    return lock


def is_locked(workdir: Path) -> bool:
    """Whether a run on this machine writes to a workdir.

    Args:
      workdir: the folder; nothing is made there.

    Returns:
      Whether.
    """
    if not (workdir / _LOCK).exists():
        return False
    lock = FileLock(workdir / _LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return True
    except (OSError, NotImplementedError):  # who may not write, or has no locks, cannot ask
        return False
    lock.release()
    return False


def check_shared(workdir: Path) -> None:
    """Raises where this process does not see what process 0 writes.

    Args:
      workdir: its folder, which process 0 has made.

    Raises:
      WorkdirError: the workdir is this machine's own.
    """
    if (workdir / CONFIG_FILE).is_file():
        return
    raise WorkdirError(
        f"{workdir} is not the folder that process 0 writes to, and all processes write their parts of checkpoints "
        "there: take a folder on a file system that all machines share, or a bucket (gs://)."
    )


def status(workdir: Path, phase: str) -> str:
    """How far a phase has come in this workdir.

    Args:
      workdir: the folder.
      phase: its name.

    Returns:
      "new", "finished", "interrupted" (it has a checkpoint to go on from), or "partial" (it has a model alone).
    """
    folder = workdir / phase
    try:
        if read_object(folder / "summary.json").get("finished") is True:
            return "finished"
    except (FileNotFoundError, NotADirectoryError):
        pass
    except JSONFileError as error:
        logging.warning("%s is not what this program writes (%s); the phase does not count as finished.", folder, error)
    if any(path.name.isdigit() for path in folder.glob("checkpoints/*")):
        return "interrupted"
    return "partial" if (folder / "model").exists() else "new"


def check_overwrite(workdir: Path, phases: Iterable[str]) -> None:
    """Whether all that --overwrite would delete was written by this program.

    Args:
      workdir: the folder.
      phases: to repeat.

    Raises:
      WorkdirError: a phase's folder holds something else.
    """
    for phase in phases:
        try:
            check_deletable(workdir / phase, checkpoints_of(workdir / phase))
        except ManifestError as error:
            raise WorkdirError(
                f"--overwrite deletes only what this program wrote: {error}. Move it away, or take another --workdir."
            ) from error
