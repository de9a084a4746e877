"""A workdir in a bucket: a local folder that is like it, file by file, and checkpoints that go there directly.

Object stores have whole objects and no appending, so metrics and samples are written locally and put up whole: with
each checkpoint, and at the end of a phase. After a restart, on this machine or another one, the folder is fetched
first; what was not put up is after the last checkpoint, and done again.
"""

import fnmatch
import hashlib
import os
import shutil
from pathlib import Path

import jax
from etils import epath
from filelock import BaseFileLock, FileLock, Timeout

from jax_rlhf.hub.folder import MODEL_FILES
from jax_rlhf.io.paths import local_path
from jax_rlhf.runtime import manifest

_REMOTE = ".remote"  # in the local folder: where it is download
CHECKPOINTS = "checkpoints"
_COMPILED = "compile_cache"  # where launch scripts let JAX keep compiled programs: it reads them from the bucket itself


def open_workdir_at(workdir: str) -> tuple[Path, BaseFileLock | None]:
    """The local folder of a workdir.

    Args:
      workdir: a path, or a bucket's: "gs://bucket/folder".

    Returns:
      The path; for a bucket a folder under ~/.cache/jax_rlhf, one a process, fetched from there, and a lock that keeps
      other runs out of it as long as it lives.

    Raises:
      ValueError: the bucket cannot be reached, or another run on this machine uses it.
    """
    if "://" not in workdir:
        return local_path(workdir), None
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "jax_rlhf"
    name = hashlib.blake2b(workdir.encode(), digest_size=8).hexdigest()
    local = cache / f"{name}-{jax.process_index()}"
    cache.mkdir(parents=True, exist_ok=True)
    lock = FileLock(local.with_suffix(".lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise ValueError(f"--workdir={workdir}: another run on this machine writes to it.") from error
    try:
        return download(epath.Path(workdir), local), lock
    except Exception as error:  # of gcsfs, s3fs, their absence, the network …
        raise ValueError(
            f"--workdir={workdir} cannot be read: {type(error).__name__}: {error}. gs:// needs `pip install gcsfs`, "
            "credentials (gcloud auth application-default login; a VM has its service account's), and a bucket that is "
            "there."
        ) from error


def download(remote: epath.Path, local: Path) -> Path:
    """Makes a local folder like a remote one, but for checkpoints, of which it has empty folders.

    Args:
      remote: may not exist yet.
      local: what is there and not in the remote one is deleted.

    Returns:
      `local`, which from now on knows where its mirror is.
    """
    shutil.rmtree(local, ignore_errors=True)
    local.mkdir(parents=True, mode=0o700)
    (local / _REMOTE).write_text(str(remote), encoding="utf-8")
    if remote.exists():
        _fetch(remote, local, leave_out=_COMPILED)
    return local


def _fetch(remote: epath.Path, local: Path, leave_out: str | None = None) -> None:
    for entry in remote.iterdir():
        if entry.name == leave_out:
            continue
        target = local / entry.name
        if entry.is_dir():
            target.mkdir(exist_ok=True)
            if not local.name.startswith(CHECKPOINTS):
                _fetch(entry, target)
        else:
            entry.copy(target, overwrite=True)


def refresh(workdir: Path) -> None:
    """Fetches again what process 0 has put up, where this is another process and the workdir has a mirror.

    Args:
      workdir: the local folder.
    """
    remote = remote_of(workdir)
    if remote is not None and jax.process_index() > 0:
        download(remote, workdir)


def remote_of(workdir: Path) -> epath.Path | None:
    """Where a workdir is download.

    Args:
      workdir: a local folder.

    Returns:
      The remote one; None = nowhere, it is the workdir itself.
    """
    try:
        return epath.Path((workdir / _REMOTE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def checkpoints_of(folder: Path) -> epath.Path:
    """Where the checkpoints of a phase are.

    Args:
      folder: <workdir>/<phase>.

    Returns:
      A folder in the workdir, or in its mirror.
    """
    remote = remote_of(folder.parent)
    return epath.Path(folder.resolve()) / CHECKPOINTS if remote is None else remote / folder.name / CHECKPOINTS


def upload(workdir: Path, phase: str | None = None, *, models: bool = False) -> None:
    """Makes the mirror like the workdir, where it has one; process 0 does it.

    Args:
      workdir: the local folder.
      phase: a folder in it, whose summary.json, which says that all is there, is put up last; None = the files beside.
      models: the phase's models too, not only what it writes as it goes.

    Raises:
      OSError: the mirror cannot be written.
    """
    remote = remote_of(workdir)
    if remote is None or jax.process_index() > 0:
        return
    if phase is None:
        _put_files(workdir, remote)
        return
    local = workdir / phase
    for entry in local.iterdir() if local.is_dir() else ():
        if (
            entry.is_dir()
            and not entry.name.startswith((".", CHECKPOINTS))
            and (models or entry.name not in manifest.MODELS)
        ):
            _put_files(entry, remote / phase / entry.name)
            for other in (remote / phase / entry.name).iterdir() if entry.name in manifest.MODELS else ():
                of_a_model = any(fnmatch.fnmatch(other.name, pattern) for pattern in MODEL_FILES)
                if of_a_model and not (entry / other.name).exists():  # such as shards of a larger one
                    other.unlink()
    _put_files(local, remote / phase)


def _put_files(local: Path, remote: epath.Path) -> None:
    remote.mkdir(parents=True, exist_ok=True)
    files = [entry for entry in local.iterdir() if entry.is_file() and not entry.name.startswith(".")]
    for file in sorted(files, key=lambda file: file.name == "summary.json"):
        epath.Path(file).copy(remote / file.name, overwrite=True)


def delete(workdir: Path, part: str) -> None:
    """Deletes a folder of a workdir, and of its mirror.

    Args:
      workdir: the local folder.
      part: in it.
    """
    remote = remote_of(workdir)
    for folder in (epath.Path(workdir) / part, *(() if remote is None else (remote / part,))):
        if not folder.exists():
            continue
        # The manifest last: who is killed in between can go on with it.
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name == manifest.NAME):
            if entry.is_dir():
                entry.rmtree()
            else:
                entry.unlink()
        folder.rmtree()
