"""2N steps straight are N steps, a stop, and N more, bit for bit; on another mesh but for rounding."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from jax_rlhf.phases import ppo, reward, run_config, sft
from jax_rlhf.phases.stop import Stopped, StopSignals
from jax_rlhf.training.checkpoint import CheckpointConfig, Checkpoints
from tests.phases import tiny

PHASES = {"sft": sft.run, "reward": reward.run, "ppo": ppo.run}
TIMES = ("time", "second", "eps")


class StopAt(StopSignals):
    """Is asked to stop at the n-th point where the run could."""

    def __init__(self, point):
        super().__init__()
        self.left = point

    def agreed(self, *others):
        self.left -= 1
        self.reason = "SIGTERM" if self.left <= 0 else None
        return (self.left <= 0, *others)


@pytest.fixture(scope="module")
def settings(tmp_path_factory, quick_compile):
    """On eight devices: with evaluations, several epochs and minibatches, adaptive KL, EMA, PPO-ptx, frozen layers."""
    del quick_compile
    folder = tmp_path_factory.mktemp("resume")
    config = tiny.config(folder)
    config.model.trainable_layers = 2
    config.mesh.data = config.mesh.fsdp = config.mesh.tensor = 2
    config.sft.steps = config.reward_training.steps = 6
    config.sft.eval_every = config.reward_training.eval_every = 2
    config.sft.optimizer.schedule, config.reward_training.optimizer.warmup_steps = "cosine", 3
    config.ppo.iterations, config.ppo.eval_every = 4, 2
    config.ppo.kl_target, config.ppo.kl_horizon, config.ppo.ema_decay, config.ppo.ptx_coef = 0.5, 100.0, 0.9, 0.5
    config.ppo.entropy_coef, config.ppo.entropy_target, config.ppo.microbatch_size = 0.01, 1.0, 4
    config.ppo.actor_optimizer.first_moment_dtype = "bfloat16"
    config.checkpoint.every = 2
    return config


def lines(file):
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not any(word in k for word in TIMES)} for row in rows]


def results(folder):
    """What a phase leaves, all but times: lines of its files, tensors of its models, arrays of its checkpoint."""
    found = {name: lines(folder / f"{name}.jsonl") for name in ("metrics", "samples")}
    found["summary"] = lines_of_summary(folder)
    for file in folder.glob("*/*.safetensors"):
        found |= {f"{file.parent.name} {name}": tensor for name, tensor in load_file(file).items()}
    checkpoints = Checkpoints(folder / "checkpoints", CheckpointConfig(keep=9))
    notes = json.loads((folder / "checkpoints" / str(checkpoints.steps[-1]) / "notes" / "metadata").read_text())
    checkpoints.close()
    return found | {"arrays": notes["arrays"], "notes": notes["notes"]["phase"]}  # their checksums


def lines_of_summary(folder):
    return {k: v for k, v in json.loads((folder / "summary.json").read_text()).items() if k != "seconds"}


@pytest.fixture(scope="module")
def straight(settings, tmp_path_factory):
    """All phases, one after the other, never stopped."""
    workdir = tmp_path_factory.mktemp("straight")
    config = run_config(settings)
    for run in PHASES.values():
        run(config, workdir)
    return workdir


def stopped_at_every_point(run, config, workdir, points):
    """Stops at each of these points, counted from the last one."""
    for point in points:
        try:
            run(config, workdir, stop=StopAt(point))
            return
        except Stopped:
            continue
    run(config, workdir)


@pytest.mark.parametrize("phase", PHASES)
def test_a_stopped_phase_goes_on_bit_for_bit(settings, straight, tmp_path, phase):
    for former in ("sft", "reward"):
        if former != phase:
            shutil.copytree(straight / former, tmp_path / former)
    stopped_at_every_point(PHASES[phase], run_config(settings), tmp_path, [4, 5, 3, 6, 4])
    wanted, got = results(straight / phase), results(tmp_path / phase)
    assert wanted.keys() == got.keys()
    for name, value in wanted.items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(got[name], value, err_msg=name)
        else:
            assert got[name] == value, name
