"""A workdir in a bucket: a local copy of its files, and checkpoints that are written to the bucket directly.

Objects in a bucket cannot be appended to. So metrics and samples are written locally, and uploaded as whole files with
each checkpoint and at the end of a phase. After a restart, on this machine or another one, the folder is downloaded
first. What was not uploaded came after the last checkpoint, and is repeated.
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

_REMOTE = ".remote"  # a file in the local folder with the address of the bucket's folder
CHECKPOINTS = "checkpoints"
_COMPILED = "compile_cache"  # of launch scripts, for compiled programs: JAX reads it in the bucket


def open_workdir_at(workdir: str) -> tuple[Path, BaseFileLock | None]:
    """The local folder of a workdir, which is downloaded if it is in a bucket.

    Args:
      workdir: a path, or "gs://bucket/folder".

    Returns:
      (folder, lock): a local path and None. For a bucket, a folder of this process under ~/.cache/jax_rlhf, and a lock
      that keeps other runs out of it until it is released.

    Raises:
      ValueError: the bucket cannot be read, or another run on this machine uses it.
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
    except Exception as error:  # from gcsfs, s3fs, a missing package, the network …
        raise ValueError(
            f"--workdir={workdir} cannot be read: {type(error).__name__}: {error}. gs:// needs `pip install gcsfs`, "
            "credentials (gcloud auth application-default login; a VM has those of its service account), and a bucket "
            "that exists."
        ) from error


def download(remote: epath.Path, local: Path) -> Path:
    """Downloads a remote folder, without the content of checkpoints, whose folders are created empty.

    Args:
      remote: the remote folder, which need not exist.
      local: the local folder; its old content is deleted, and the address of the remote folder is stored in it.

    Returns:
      `local`.
    """
    shutil.rmtree(local, ignore_errors=True)
    local.mkdir(parents=True, mode=0o700)
    (local / _REMOTE).write_text(str(remote), encoding="utf-8")
    if remote.exists():
        _download_files(remote, local, skip=_COMPILED)
    return local


def _download_files(remote: epath.Path, local: Path, skip: str | None = None) -> None:
    for entry in remote.iterdir():
        if entry.name == skip:
            continue
        target = local / entry.name
        if entry.is_dir():
            target.mkdir(exist_ok=True)
            if not local.name.startswith(CHECKPOINTS):
                _download_files(entry, target)
        else:
            entry.copy(target, overwrite=True)


def refresh(workdir: Path) -> None:
    """Downloads what process 0 has uploaded, in other processes, if the workdir is in a bucket.

    Args:
      workdir: the local folder.
    """
    remote = remote_of(workdir)
    if remote is not None and jax.process_index() > 0:
        download(remote, workdir)


def remote_of(workdir: Path) -> epath.Path | None:
    """The remote folder of which a local folder is a copy; None if the workdir is local."""
    try:
        return epath.Path((workdir / _REMOTE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def checkpoints_of(folder: Path) -> epath.Path:
    """The folder of a phase's checkpoints, in the workdir or in its bucket.

    Args:
      folder: <workdir>/<phase>.
    """
    remote = remote_of(folder.parent)
    return epath.Path(folder.resolve()) / CHECKPOINTS if remote is None else remote / folder.name / CHECKPOINTS


def upload(workdir: Path, phase: str | None = None, *, models: bool = False) -> None:
    """Uploads files of a workdir in process 0, if the workdir is in a bucket.

    Args:
      workdir: the local folder.
      phase: the phase whose folder is uploaded; None = only the files of the workdir itself. summary.json is uploaded
        last, since it marks the phase as finished.
      models: whether to upload the phase's models too.

    Raises:
      OSError: the bucket cannot be written.
    """
    remote = remote_of(workdir)
    if remote is None or jax.process_index() > 0:
        return
    if phase is None:
        _upload_files(workdir, remote)
        return
    local = workdir / phase
    for entry in local.iterdir() if local.is_dir() else ():
        if (
            entry.is_dir()
            and not entry.name.startswith((".", CHECKPOINTS))
            and (models or entry.name not in manifest.MODELS)
        ):
            _upload_files(entry, remote / phase / entry.name)
            for other in (remote / phase / entry.name).iterdir() if entry.name in manifest.MODELS else ():
                is_model_file = any(fnmatch.fnmatch(other.name, pattern) for pattern in MODEL_FILES)
                if is_model_file and not (entry / other.name).exists():  # e.g. shards of an earlier, larger model
                    other.unlink()
    _upload_files(local, remote / phase)


def _upload_files(local: Path, remote: epath.Path) -> None:
    remote.mkdir(parents=True, exist_ok=True)
    files = [entry for entry in local.iterdir() if entry.is_file() and not entry.name.startswith(".")]
    for file in sorted(files, key=lambda file: file.name == "summary.json"):
        epath.Path(file).copy(remote / file.name, overwrite=True)


def delete(workdir: Path, part: str) -> None:
    """Deletes a folder in a workdir, and its remote copy.

    Args:
      workdir: the local folder.
      part: the name of the folder in it.
    """
    remote = remote_of(workdir)
    for folder in (epath.Path(workdir) / part, *(() if remote is None else (remote / part,))):
        if not folder.exists():
            continue
        # The manifest is deleted last, so that --overwrite works again if this process is killed before.
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name == manifest.NAME):
            if entry.is_dir():
                entry.rmtree()
            else:
                entry.unlink()
        folder.rmtree()
