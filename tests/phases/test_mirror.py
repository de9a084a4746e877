"""A workdir in a bucket: what is there after each step, and that another machine goes on from it.

The bucket is a store in memory under gs://, or a folder; Google's own was not at hand.
"""

import shutil

import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from jax_rlhf.phases import ppo, run_config, sft
from jax_rlhf.phases.mirror import checkpoints_of, delete, mirrored, open_workdir_at, put_up, remote_of
from jax_rlhf.phases.stop import Stopped
from jax_rlhf.phases.workdir import open_workdir, status
from tests.phases import test_resume as resume
from tests.phases import tiny


class Bucket(MemoryFileSystem):
    """Google's, in this process."""

    protocol = "gs"
    store: dict = {}  # noqa: RUF012, as its base has it
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


def test_files_go_to_the_bucket_and_come_back(bucket):
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
    put_up(workdir)
    put_up(workdir, "sft")
    assert (remote / "sft" / "metrics.jsonl").read_text() == "metrics.jsonl"
    assert not (remote / "sft" / "model").exists()
    put_up(workdir, "sft", models=True)
    (remote / "sft" / "checkpoints" / "7").mkdir(parents=True)
    (remote / "sft" / "checkpoints" / "7" / "large").write_text("…")
    (workdir / "sft" / "model" / "b.safetensors").unlink()
    put_up(workdir, "sft", models=True)
    (workdir / "sft" / "metrics.jsonl").write_text("lost with the machine")

    workdir, _ = open_workdir_at(bucket)  # as another machine does
    files = {str(path.relative_to(workdir)) for path in workdir.rglob("*") if path.is_file()}
    assert files == {".remote", "config.json", "sft/metrics.jsonl", "sft/summary.json", "sft/model/a.safetensors"}
    assert (workdir / "sft" / "metrics.jsonl").read_text() == "metrics.jsonl"
    assert status(workdir, "sft") == "interrupted"  # its summary is no JSON; the checkpoint's folder tells
    delete(workdir, "sft")
    assert not (remote / "sft").exists()
    assert status(workdir, "sft") == "new"


def test_a_bucket_that_cannot_be_reached_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"--workdir=s3://nowhere/run cannot be read: .*gcsfs"):
        open_workdir_at("s3://nowhere/run")


def test_a_plain_path_has_no_mirror(tmp_path):
    assert open_workdir_at(str(tmp_path / "run")) == (tmp_path / "run", None)
    assert remote_of(tmp_path / "run") is None


def test_another_machine_goes_on(tmp_path, quick_compile):
    """SFT and PPO on one machine, stopped, and ended on another that has nothing but the bucket."""
    config = tiny.config(tmp_path)
    config.phases, config.reward.path = ("sft", "ppo"), config.model.path
    config.mesh.data, config.mesh.fsdp, config.sft.steps, config.checkpoint.every = 8, 1, 4, 2
    config.ppo.num_minibatches = 1
    settings, bucket = run_config(config), epath.Path(tmp_path / "bucket")
    for phase in (sft, ppo):
        phase.run(settings, tmp_path / "straight")

    workdir = mirrored(bucket, tmp_path / "first")
    open_workdir(workdir, config, ("sft", "ppo"), overwrite=False)
    sft.run(settings, workdir)
    put_up(workdir, "sft", models=True)
    with pytest.raises(Stopped):
        ppo.run(settings, workdir, stop=resume.StopAt(4))
    shutil.rmtree(workdir)
    workdir = mirrored(bucket, tmp_path / "second")
    assert [status(workdir, phase) for phase in ("sft", "ppo")] == ["finished", "interrupted"]
    assert open_workdir(workdir, config, ("sft", "ppo"), overwrite=False) == []
    ppo.run(settings, workdir)
    put_up(workdir, "ppo", models=True)
    for name in ("metrics", "samples"):
        assert resume.lines(bucket / "ppo" / f"{name}.jsonl") == resume.lines(
            tmp_path / "straight" / "ppo" / f"{name}.jsonl"
        )
    one, other = (folder / "ppo" / "model" / "model.safetensors" for folder in (tmp_path / "straight", bucket))
    assert one.read_bytes() == other.read_bytes()
