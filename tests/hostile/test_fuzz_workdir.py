"""Malformed files of a workdir or checkpoint are repaired or end in a documented error, never in wrong results."""

import json
import random
import shutil

import pytest
from hypothesis import strategies as some

from jax_rlhf import verify
from jax_rlhf.runtime.checkpoint import RestoreError, abstract
from jax_rlhf.runtime.workdir import WorkdirError, check_overwrite
from tests.hostile import simulator
from tests.hostile.fuzzing import damaged, fuzzed, inputs, json_files
from tests.hostile.test_simulator import settings
from tests.runtime.test_checkpoint import equal, opened, saved, tree

NAMES = ["config.json", "overwritten.json", "sft/summary.json", "reward/manifest.json", "sft/manifest.json"]
NAMES += ["reward/summary.json", "ppo/metrics.jsonl", "ppo/samples.jsonl", "ppo/checkpoints/2/notes/metadata"]
NAMES += ["ppo/manifest.json", "sft/model/config.json", "ppo/checkpoints", "sft"]


@pytest.fixture
def interrupted(tmp_path):
    """The workdir of a run that was stopped in its last phase."""
    disk = simulator.Disk(tmp_path / "disk", random.Random(0))
    with simulator.simulated(disk, random.Random(0)):
        simulator.run(settings(), disk.live / "run", simulator.StopAt(None))
        shutil.rmtree(disk.live / "run" / "ppo")
        with pytest.raises(simulator.Stopped):
            simulator.run(settings(), disk.live / "run", simulator.StopAt(8))
        yield disk.live / "run"


@inputs(150, 10_000)
def test_malformed_workdir_files_are_repaired_or_refused(examples, interrupted, tmp_path):
    workdir, seen = tmp_path / "run", set()
    config = json.loads((interrupted / "config.json").read_text())

    def check(name, content):
        shutil.rmtree(workdir, ignore_errors=True)
        shutil.copytree(interrupted, workdir)
        harm(workdir / name, content)
        for what, wrong in verify.verify(workdir):
            assert isinstance(what, str), wrong
        try:
            check_overwrite(workdir, ("ppo",))
        except WorkdirError as error:
            seen.add("refused" if str(error) else "without a word")
        try:
            simulator.run(settings(), workdir, simulator.StopAt(None))
        except simulator.WORDS as error:
            seen.add("refused" if str(error) else "without a word")
            return
        seen.add("read")
        assert simulator.model_of(workdir / "ppo" / "model") == simulator.expected()

    contents = json_files(config) | some.sampled_from(["folder", "link", "nothing", "file"])
    fuzzed(examples, check, few=150, timed=False, name=some.sampled_from(NAMES), content=contents)
    assert seen == {"read", "refused"}


def harm(file, content):
    if file.is_dir():
        shutil.rmtree(file)
    file.unlink(missing_ok=True)
    if content == "folder":
        file.mkdir(parents=True)
    elif content == "link":
        file.symlink_to("nowhere")
    elif content == "file":
        file.write_text("text")
    elif content != "nothing":
        file.write_bytes(content)


@inputs(25, 2_000)
def test_a_damaged_checkpoint_is_never_restored_wrongly(examples, tmp_path):
    """Restores the last checkpoint exactly or the one before it, or raises RestoreError."""
    saved(tmp_path, 1, 2)
    folder, seen = tmp_path / "checkpoints", set()
    shutil.move(folder, tmp_path / "whole")
    whole = tmp_path / "whole" / "2"
    files = sorted(str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file() and path.stat().st_size)
    notes = json.loads((whole / "notes" / "metadata").read_text())

    def check(name, content):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(tmp_path / "checkpoints.damaged", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", folder)
        (folder / "2" / name).write_bytes(content)
        checkpoints = opened(tmp_path)
        try:
            restored = checkpoints.restore(abstract(tree()))
        except RestoreError as error:
            seen.add("refused" if str(error) else "without a word")
        else:
            seen.add(restored.step)
            equal(restored.state, tree(restored.step))
            assert restored.notes == {"at": restored.step}
        finally:
            checkpoints.close()

    harms = some.sampled_from(files).flatmap(
        lambda name: some.tuples(some.just(name), damaged((whole / name).read_bytes()))
    ) | json_files(notes).map(lambda content: ("notes/metadata", content))
    fuzzed(examples, lambda harm: check(*harm), few=25, harm=harms)
    assert {1, 2} <= seen <= {1, 2, "refused"}
