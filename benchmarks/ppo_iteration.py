"""Seconds, tokens/s, GFLOP/s and memory of a PPO iteration on random models, with default settings; one JSON line.

    python -m benchmarks.ppo_iteration --shape=small
    python -m benchmarks.ppo_iteration --shape=small --trl=/path/to/python    # compare with TRL in another environment

Four separate models, float32, no EOS. Figures are medians over iterations. The first iteration, which compiles, is
reported separately.
"""

import argparse
import json
import multiprocessing
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks.memory import peak_gigabytes
from benchmarks.shapes import SHAPES, Shape, write_checkpoint
from jax_rlhf import PPOTrainer, Prompts, RLHFEngine

ROLES = {"model": "lm", "reference": "lm", "critic": "scalar", "reward_model": "scalar"}


def create_trainer(shape: Shape, folder: Path) -> PPOTrainer:
    """Loads the four models from checkpoints, as in a user's run."""
    # Written by another process, so that this process's peak memory is that of a run.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.starmap(write_checkpoint, [(folder / role, shape, head) for role, head in ROLES.items()])
    config = {role: {"path": str(folder / role)} for role in ROLES}
    ppo = {"sampling": {"max_new_tokens": shape.response, "eos_ids": ()}, "ppo_epochs": shape.ppo_epochs}
    return PPOTrainer(RLHFEngine.create(config), ppo)


def measure(shape: Shape, iterations: int) -> dict:
    """Runs iterations, and times the three phases of each."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = create_trainer(shape, Path(folder))
    random = np.random.RandomState(0)
    tokens = random.randint(0, shape.vocab_size, (shape.batch, shape.prompt)).astype(np.int32)
    prompts = Prompts(tokens, np.ones_like(tokens, bool), np.arange(shape.batch, dtype=np.int32))
    engine, seconds = trainer.engine, {"sample": [], "generate": [], "train": [], "iteration": []}
    for iteration in range(iterations + 1):
        start = time.perf_counter()
        experience = jax.block_until_ready(trainer.generate_experience(prompts))
        middle = time.perf_counter()
        trainer.train_rlhf(experience)
        end = time.perf_counter()
        # Sampling is part of `generate`. It is timed separately, outside the iteration.
        key = jax.random.key(iteration)
        jax.block_until_ready(engine.sample(tokens, prompts.mask, prompts.row_ids, key, trainer.sampling))
        for name, value in zip(
            seconds, (time.perf_counter() - end, middle - start, end - middle, end - start), strict=True
        ):
            seconds[name].append(value)
    median = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    phases = {"sample": median["sample"], "score": median["generate"] - median["sample"], "train": median["train"]}
    return {
        "seconds_per_iteration": median["iteration"],
        "seconds": phases,
        "first_iteration_seconds": seconds["iteration"][0],
        "generated_tokens_per_second": shape.batch * shape.response / median["sample"],
        "gflop_per_second": {name: shape.flops[name] / 1e9 / phases[name] for name in phases},
        "peak_memory_gb": peak_gigabytes(),
    }


def main() -> None:
    """Parses arguments, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--trl", metavar="PYTHON", help="a Python that has TRL; runs it on the same shapes afterwards")
    arguments = parser.parse_args()
    result = {
        "shape": arguments.shape,
        "device": jax.devices()[0].device_kind,
        "jax_rlhf": measure(SHAPES[arguments.shape], arguments.iterations),
    }
    if arguments.trl:
        command = [
            arguments.trl,
            str(Path(__file__).with_name("trl_iteration.py")),
            json.dumps(vars(SHAPES[arguments.shape])),
        ]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        result["trl"] = json.loads(printed.splitlines()[-1])
        result["trl_over_jax_rlhf"] = (
            result["trl"]["seconds_per_iteration"] / result["jax_rlhf"]["seconds_per_iteration"]
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
