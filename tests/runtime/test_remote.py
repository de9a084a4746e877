"""Uploads and downloads of a workdir in a bucket. An in-memory file system replaces Google Cloud Storage.

tests/cli/test_resume.py shows that another machine continues a run from a bucket.
"""

import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from jax_rlhf.runtime.remote import checkpoints_of, delete, open_workdir_at, remote_of, upload
from jax_rlhf.runtime.workdir import status


class Bucket(MemoryFileSystem):
    """A Google Cloud Storage bucket in the memory of this process."""

    protocol = "gs"
    store: dict = {}  # noqa: RUF012, as in the base class
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        path = "/" + str(path).removeprefix("gs://").strip("/")
        return path.rstrip("/")


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    for name in ("gs", "gcs"):
        monkeypatch.setitem(_registry, name, Bucket)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield "gs://bucket/run"
    Bucket.store.clear()


def test_files_are_uploaded_to_the_bucket_and_downloaded_again(bucket):
    workdir, lock = open_workdir_at(bucket)
    with pytest.raises(ValueError, match="another run on this machine"):
        open_workdir_at(bucket)
    lock.release()
    assert str(remote_of(workdir)) == bucket
    assert str(checkpoints_of(workdir / "sft")) == f"{bucket}/sft/checkpoints"
    (workdir / "sft" / "model").mkdir(parents=True)
    for name in ("metrics.jsonl", "summary.json", "model/a.safetensors", "model/b.safetensors"):
        (workdir / "sft" / name).write_text(name)
    (workdir / "config.json").write_text("{}")
    remote = epath.Path(bucket)
    upload(workdir)
    upload(workdir, "sft")
    assert (remote / "sft" / "metrics.jsonl").read_text() == "metrics.jsonl"
    assert not (remote / "sft" / "model").exists()
    upload(workdir, "sft", models=True)
    (remote / "sft" / "checkpoints" / "7").mkdir(parents=True)
    (remote / "sft" / "checkpoints" / "7" / "large").write_text("…")
    (workdir / "sft" / "model" / "b.safetensors").unlink()
    upload(workdir, "sft", models=True)
    (workdir / "sft" / "metrics.jsonl").write_text("lost with the machine")

    workdir, _ = open_workdir_at(bucket)  # as on another machine
    files = {str(path.relative_to(workdir)) for path in workdir.rglob("*") if path.is_file()}
    assert files == {".remote", "config.json", "sft/metrics.jsonl", "sft/summary.json", "sft/model/a.safetensors"}
    assert (workdir / "sft" / "metrics.jsonl").read_text() == "metrics.jsonl"
    assert status(workdir, "sft") == "interrupted"  # its summary is not JSON, but it has a checkpoint
    delete(workdir, "sft")
    assert not (remote / "sft").exists()
    assert status(workdir, "sft") == "new"


def test_compiled_programs_in_the_bucket_are_not_downloaded(bucket):
    """JAX reads them from the bucket itself."""
    remote = epath.Path(bucket)
    for folder in ("compile_cache", "sft/compile_cache"):  # only the first is the compile cache of launch scripts
        (remote / folder).mkdir(parents=True)
        (remote / folder / "a-cache").write_text("large")
    workdir, lock = open_workdir_at(bucket)
    lock.release()
    files = {str(path.relative_to(workdir)) for path in workdir.rglob("*") if path.is_file()}
    assert files == {".remote", "sft/compile_cache/a-cache"}
    upload(workdir)
    assert (remote / "compile_cache" / "a-cache").exists()


def test_a_bucket_that_cannot_be_reached_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"--workdir=s3://nowhere/run cannot be read: .*gcsfs"):
        open_workdir_at("s3://nowhere/run")


def test_a_local_workdir_has_no_bucket(tmp_path):
    assert open_workdir_at(str(tmp_path / "run")) == (tmp_path / "run", None)
    assert remote_of(tmp_path / "run") is None
