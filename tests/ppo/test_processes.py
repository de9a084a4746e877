"""PPO over two real processes: each has its own prompts and scores its own responses."""

import json

import pytest

from tests.ppo import tiny
from tests.processes import finish, free_port, start

SHARE = """
import json, sys, jax, numpy as np
jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]), initialization_timeout=60)
from jax.sharding import Mesh
from tests.ppo import test_processes
mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"))
rows = slice(8 * jax.process_index(), 8 * jax.process_index() + 8)
print("METRICS", json.dumps(test_processes.train(mesh, rows)))
"""


def train(mesh, rows):
    """Two iterations on some of 16 rows; the metrics, and how many responses the reward function was asked for."""
    asked = []

    def reward(prompts, responses, names):
        asked.extend(names)
        return tiny.fractional_reward(prompts, responses)

    engine = tiny.RLHFEngine(tiny.policy(), mesh=mesh)
    trainer = tiny.trainer(engine, reward=reward, num_minibatches=2)
    lines = []
    for iteration in range(2):
        batch = tiny.ragged_prompts(16, seed=iteration)
        mine = tiny.Prompts(
            batch.tokens[rows], batch.mask[rows], batch.row_ids[rows], {"names": batch.row_ids[rows].tolist()}
        )
        metrics = trainer.train_rlhf(trainer.generate_experience(mine))
        lines.append({name: value for name, value in metrics.items() if name not in ("eps", "time/iteration")})
    return {"lines": lines, "asked": asked}


def test_two_processes_train_as_one_does():
    port = free_port()
    processes = [start(SHARE, port, index, devices=4) for index in range(2)]
    # Gloo prints too, from several threads, so that its lines may be torn.
    printed = [finish(process, timeout=300).partition("METRICS ")[2] for process in processes]
    first, second = (json.JSONDecoder().raw_decode(text)[0] for text in printed)
    assert first["lines"] == second["lines"]
    assert (first["asked"], second["asked"]) == ([*range(8)] * 2, [*range(8, 16)] * 2)
    alone = train(None, slice(0, 16))
    assert alone["asked"] == [*range(16)] * 2
    for two, one in zip(first["lines"], alone["lines"], strict=True):
        for name, value in one.items():
            assert two[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
