"""Thousands of simulated runs with kills, power cuts, damaged files and clocks that jump, all in one."""

import collections
import tempfile
import time
from pathlib import Path

import pytest

from jax_rlhf.phases import default_config
from tests.hostile.fuzzing import SEED
from tests.hostile.simulator import scenario


def settings():
    config = default_config()
    config.checkpoint.every, config.watchdog.action, config.log.tensorboard = 1, "off", False
    config.model.path = "base"
    return config


@pytest.fixture
def folder():
    """In memory: it is fast, and the number of a file (inode), by which the simulator knows it, is never another's."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as made:
        yield Path(made)


@pytest.mark.parametrize("count", [60, pytest.param(5_000, marks=pytest.mark.slow)])
def test_a_run_ends_right_or_stops_with_a_word(folder, count):
    """A short run has the same seeds each time; a long one begins with FUZZ_SEED."""
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
