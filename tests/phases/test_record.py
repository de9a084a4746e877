"""What a phase says while it runs."""

import numpy as np

from jax_rlhf.phases.config import LogConfig
from jax_rlhf.phases.record import Record
from jax_rlhf.rl import Prompts


def prompts(width):
    return Prompts(np.zeros((2, width), np.int32), np.ones((2, width), bool), np.arange(2, dtype=np.int32))


def test_a_width_that_comes_in_mid_run_is_said_once(tmp_path, capsys):
    with Record(tmp_path / "ppo", LogConfig(tensorboard=False)) as record:
        for step, width in enumerate([16, 16, 32, 16, 32, 64]):
            record.compiles_for(step, prompts(width))
    lines = [line for line in capsys.readouterr().out.splitlines() if "compiling" in line]
    assert [line.partition("ppo: ")[2] for line in lines] == [
        "step 2: compiling for batches that are 32 tokens wide",
        "step 5: compiling for batches that are 64 tokens wide",
    ]
