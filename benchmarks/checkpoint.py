"""Time that saving a checkpoint blocks training, and its total time; one JSON line.

    python -m benchmarks.checkpoint --megabytes=1200 --folder=FOLDER

Saves random float32 arrays, as large as a model of 100 million parameters with Adam, while a loop of matrix products
runs.
"""

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from jax_rlhf.runtime.checkpoint import Checkpoints, abstract
from jax_rlhf.runtime.config import CheckpointConfig


@jax.jit
def work(x: jax.Array) -> jax.Array:
    """A stand-in for a training step."""
    return jax.lax.fori_loop(0, 20, lambda _, x: jnp.tanh(x @ x), x)


def measure(megabytes: int, folder: Path, rounds: int) -> dict:
    """Saves several checkpoints, runs `work` meanwhile, and reads the last one back."""
    count = max(1, megabytes // 48)
    keys = jax.random.split(jax.random.key(0), count)
    state = {f"layer{i}": jax.random.normal(key, (3000, 4000)) for i, key in enumerate(keys)}  # 48 MB each
    x = jax.block_until_ready(work(jnp.ones((1000, 1000))))
    shutil.rmtree(folder, ignore_errors=True)
    checkpoints = Checkpoints(folder, CheckpointConfig(keep=1))
    blocked, whole, steps = [], [], []
    for step in range(rounds + 1):  # the first compiles the checksums
        started = time.perf_counter()
        checkpoints.save(step, state, {})
        saved = time.perf_counter()
        while checkpoints.saving:
            before = time.perf_counter()
            x = jax.block_until_ready(work(x))
            steps.append(time.perf_counter() - before)
        checkpoints.wait()
        blocked.append(saved - started)
        whole.append(time.perf_counter() - started)
    started = time.perf_counter()
    checkpoints.restore(abstract(state))
    read = time.perf_counter() - started
    checkpoints.close()
    shutil.rmtree(folder)
    return {
        "megabytes": 48 * count,
        "blocked_s": round(statistics.median(blocked[1:]), 3),
        "whole_s": round(statistics.median(whole[1:]), 2),
        "blocked_share": round(statistics.median(b / w for b, w in zip(blocked[1:], whole[1:], strict=True)), 3),
        "read_s": round(read, 2),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1200)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.megabytes, arguments.folder, arguments.rounds)))
