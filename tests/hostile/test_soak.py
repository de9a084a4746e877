"""Memory, arrays and open files do not grow over many iterations of PPO with checkpoints and evaluations."""

import gc
import os
import pathlib

import jax
import pytest

from tests.cli import test_end_to_end as alone

CONFIG = """
from pathlib import Path
from tests.cli import tiny
def get_config():
    config = tiny.config(Path({folder!r}))
    config.phases, config.sft_model_path = ("ppo",), config.model.path
    config.ppo.reward.functions = ("tests.hostile.test_soak:watching",)
    config.ppo.iterations, config.ppo.eval_every, config.checkpoint.every = {iterations}, 10, 5
    config.ppo.actor.ema_decay, config.ppo.kl.target, config.ppo.loss.ptx_coef = 0.9, 1.0, 0.1
    return config
"""


def watching(prompts, responses, **columns):
    """A reward function that writes bytes of memory, bytes of arrays on devices, and the number of open files.

    It is called once per iteration, and once per batch of an evaluation.
    """
    del prompts, columns
    gc.collect()
    memory = int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    arrays = sum(array.nbytes for array in jax.live_arrays())
    with open("seen", "a") as file:
        file.write(f"{memory} {arrays} {len(os.listdir('/proc/self/fd'))}\n")
    return [float(len(response)) for response in responses]


@pytest.mark.parametrize("iterations", [30, pytest.param(500, marks=pytest.mark.slow)])
def test_memory_arrays_and_open_files_do_not_grow(iterations, tmp_path):
    (tmp_path / "config.py").write_text(CONFIG.format(folder=str(tmp_path), iterations=iterations))
    code, printed, errors = alone.run(tmp_path, config=tmp_path / "config.py")
    assert code == 0, errors[-3000:]
    assert f"ppo: iterations {iterations}" in printed
    seen = [tuple(map(int, line.split())) for line in (tmp_path / "seen").read_text().splitlines()]
    memory, arrays, files = zip(*seen[len(seen) // 3 :], strict=True)  # all programs are compiled by then
    print(
        f"{iterations} iterations, from a third on: memory {memory[0] / 1e6:.0f} → {memory[-1] / 1e6:.0f} MB, arrays "
        f"{min(arrays) / 1e6:.2f} to {max(arrays) / 1e6:.2f} MB, open files {min(files)} to {max(files)}"
    )
    assert memory[-1] - memory[0] < 30e6
    half = len(arrays) // 2  # a leak raises the minimum; a checkpoint being written raises other values
    assert min(arrays[half:]) <= min(arrays[:half])
    assert min(files[half:]) <= min(files[:half])
    assert max(arrays) < 4 * min(arrays)
