"""Simulated runs with kills, power cuts, damaged files and jumping clocks; thousands of them in a slow run."""

import collections
import errno
import random
import tempfile
import time
from pathlib import Path

import pytest

from jax_rlhf.config import default_config
from jax_rlhf.runtime.run_logger import RunLogger
from tests.hostile import simulator
from tests.hostile.fuzzing import SEED
from tests.hostile.simulator import scenario


def settings():
    config = default_config()
    config.checkpoint.every, config.watchdog.action, config.log.tensorboard = 1, "off", False
    config.model.path = "base"
    return config


@pytest.fixture
def folder():
    """A folder in memory. It is fast, and does not reuse inodes, by which the simulator identifies files."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as made:
        yield Path(made)


@pytest.mark.parametrize("count", [60, pytest.param(5_000, marks=pytest.mark.slow)])
def test_a_run_ends_with_the_right_result_or_an_error(folder, count):
    """A short run uses the same seeds each time. A long run starts at FUZZ_SEED."""
    total, started = collections.Counter(), time.monotonic()
    first = 0 if count < 100 else SEED
    for seed in range(first, first + count):
        try:
            total.update(scenario(folder / str(seed), seed, settings()))
        except Exception as error:
            raise AssertionError(f"scenario({seed}): {error!r}") from error
    seconds = time.monotonic() - started
    print(f"seeds from {first}: {dict(total)}; {60 * total['runs'] / seconds:.0f} runs a minute")
    assert min(total[name] for name in ("kills", "power cuts", "terms", "damage", "words")) >= count / 30


def test_a_disk_error_at_the_end_of_a_step_loses_no_line(folder, monkeypatch):
    """If reading the logger's position fails after a step, the checkpoint that saves the trained state rereads it."""
    asked, position = 0, RunLogger.position

    def failing(record):
        nonlocal asked
        asked += 1
        if asked == at:
            raise OSError(errno.EDQUOT, "Disk quota exceeded", "samples.jsonl")
        return position(record)

    monkeypatch.setattr(RunLogger, "position", failing)
    for at in range(1, 100):
        disk, asked = simulator.Disk(folder / str(at), random.Random(0)), 0
        with simulator.simulated(disk, random.Random(0)):
            workdir = disk.live / "run"
            try:
                simulator.run(settings(), workdir, simulator.StopAt(None))
            except OSError:
                simulator.run(settings(), workdir, simulator.StopAt(None))
            else:
                break
            simulator.check(workdir, False)
    assert at > 15
