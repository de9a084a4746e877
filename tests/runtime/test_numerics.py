"""Steps with NaN are skipped and counted. After several in a row the run stops, and saves the batch."""

import json

import jax
import numpy as np
import pytest

from jax_rlhf.cli.phases import run_phase
from jax_rlhf.config import run_config
from jax_rlhf.parallel import put_rows
from jax_rlhf.runtime.numerics import FaultError
from tests.cli import tiny


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    config = tiny.config(tmp_path_factory.mktemp("faults"))
    config.mesh.data, config.checkpoint.every, config.max_bad_steps = 8, 1, 2
    config.mesh.fsdp = 1
    config.reward.steps, config.reward.normalize_rows = 6, 0
    config.reward.start_from = config.sft_model_path = config.model.path
    config.ppo.iterations, config.ppo.num_minibatches = 3, 1
    return config


def poisoned(monkeypatch, steps):
    """Sets the margins of these batches, counted from 0, to NaN."""
    count = iter(range(1000))

    def put(batch, layout):
        if next(count) in steps:
            batch = batch.replace(margin=np.full_like(batch.margin, np.nan))
        return put_rows(batch, layout)

    monkeypatch.setattr("jax_rlhf.runtime.supervised_phase.put_rows", put)


def train_lines(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "train/loss" in row]


def test_a_bad_step_is_skipped_and_counted(config, tmp_path, monkeypatch):
    poisoned(monkeypatch, {2, 4})
    run_phase("reward", run_config(config), tmp_path)
    rows = train_lines(tmp_path / "reward")
    assert [row["train/bad_steps"] for row in rows] == [0, 0, 1, 0, 1, 0]
    assert [row["train/skipped_updates"] for row in rows] == [0, 0, 1, 1, 2, 2]
    assert [row["train/loss"] is None for row in rows] == [False, False, True, False, True, False]


def test_bad_steps_in_a_row_stop_the_run_which_continues_after_a_fix(config, tmp_path, monkeypatch):
    run_phase("reward", run_config(config), tmp_path / "wanted")
    poisoned(monkeypatch, {2, 3, 4})
    with pytest.raises(
        FaultError, match=r"reward, step 4: 2 steps in a row .* The batch is in .*step4.npz.*debug=true"
    ):
        run_phase("reward", run_config(config), tmp_path)
    batch = np.load(tmp_path / "reward" / "bad_batch" / "step4.npz", allow_pickle=False)
    assert batch["chosen"].shape == (8, 16)
    # Checkpoints exist only for the steps before the bad ones.
    assert sorted(file.name for file in (tmp_path / "reward" / "checkpoints").iterdir()) == ["1", "2"]
    assert not (tmp_path / "reward" / "model").exists()
    monkeypatch.undo()
    run_phase("reward", run_config(config), tmp_path)
    wanted, got = (train_lines(folder / "reward") for folder in (tmp_path / "wanted", tmp_path))
    assert [row["train/loss"] for row in got] == [row["train/loss"] for row in wanted]


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ({"kl": 1e-6}, r"ppo, step 2: objective/kl=.*, config.ppo.limits.kl=1e-06"),
        ({"ratio": 2.0}, r"ppo, step \d: val/largest_ratio_gap=.*, config.ppo.limits.ratio=2"),
    ],
)
def test_a_run_stops_when_a_metric_exceeds_its_limit(config, tmp_path, limit, message):
    other = config.copy_and_resolve_references()
    other.ppo.limits.update(limit)
    other.reward_model.path = None
    other.ppo.reward.functions = ("tests.cli.tiny:count_a",)
    other.ppo.actor.optimizer.learning_rate, other.ppo.ppo_epochs, other.ppo.kl.kind = 0.03, 8, "k1"
    with pytest.raises(FaultError, match=message):
        run_phase("ppo", run_config(other), tmp_path)
    stopped = int(next((tmp_path / "ppo" / "bad_batch").iterdir()).name.removeprefix("step").removesuffix(".npz"))
    kept = [int(file.name) for file in (tmp_path / "ppo" / "checkpoints").iterdir()]
    assert max(kept, default=0) == stopped - 1


def test_debug_stops_at_the_first_nan(config, tmp_path, monkeypatch):
    other = config.copy_and_resolve_references()
    other.debug = True
    poisoned(monkeypatch, {1, 2})  # the debug mode runs a step with NaN twice
    with pytest.raises(FloatingPointError, match="nan"):
        run_phase("reward", run_config(other), tmp_path)
    assert len(train_lines(tmp_path / "reward")) == 1
    assert not jax.config.jax_debug_nans
