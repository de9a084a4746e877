"""What would fail later is said at the start, with how to mend it."""

import json
import signal
from pathlib import Path

import pytest

from jax_rlhf.phases import run_config
from jax_rlhf.phases.check import check_run
from jax_rlhf.phases.config import LogConfig
from jax_rlhf.phases.record import Record, printable
from jax_rlhf.phases.workdir import open_workdir, status
from tests.data import tiny as data
from tests.phases import tiny


@pytest.fixture
def config(tmp_path):
    config = tiny.config(tmp_path)
    config.data.sft_batch_size = config.data.reward_batch_size = config.data.ppo_batch_size = 16
    config.data.max_tokens = 20
    return config


def check(config, tmp_path):
    check_run(run_config(config), tmp_path / "run", overwrite=False)


def test_a_good_config_passes(config, tmp_path):
    check(config, tmp_path)


def set_field(config, path, value):
    *sections, name = path.split(".")
    for section in sections:
        config = config[section]
    config[name] = value


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.path": "/nowhere"}, "/nowhere: no such file or folder"),
        ({"model.trainable_layers": 9}, "config.model.trainable_layers=9 must lie within 1 and the model's 3 layers"),
        ({"reward_training.num_layers": 5}, "config.reward_training.num_layers=5 must lie"),
        ({"reward_training.trainable_layers": 3}, "must lie within 1 and the model's 2 layers"),
        ({"critic.trainable_layers": 3}, "config.critic.trainable_layers=3 must lie within 1 and the model's 2 layers"),
        ({"ppo.microbatch_size": 5}, r"config.ppo.microbatch_size=5 does not divide a batch of 8 rows"),
        ({"reward_training.loss": "token", "reward_training.compare": "all"}, 'compare="all" is for loss="bradley'),
        ({"ppo.actor_optimizer.schedule": "linear", "ppo.actor_optimizer.warmup_steps": 12}, "config.ppo.actor_optim"),
        ({"phases": ("ppo",)}, "sft/model is missing: run the sft phase first.*--config.sft_model_path"),
        ({"phases": ("sft", "ppo")}, "reward/model is missing: run the reward phase first"),
        ({"sft.microbatch_size": 5}, r"config.sft.microbatch_size=5 does not divide a batch of 16 rows.*8, 16"),
        ({"data.ppo_batch_size": 12}, r"ppo_batch_size=12 is no multiple of config.ppo.num_minibatches=2 × .* 16 or"),
        ({"data.ppo_batch_size": 160}, "the ppo phase has 90 rows, fewer than a batch of 160"),
        ({"data.paths": ("gone.jsonl",)}, "'gone.jsonl' is no file or folder here"),
        ({"ppo.reward_functions": ("tests.phases.tiny:nobody",)}, "cannot be imported"),
        ({"mesh.data": 3}, "data=3 × fsdp=-1 × tensor=1 is not the 8 devices that there are"),
        ({"ppo.clip_range": -1.0}, "clip_range=-1.0 must be 0 or more"),
    ],
)
def test_what_cannot_work_is_said_at_the_start(config, tmp_path, changes, message):
    for path, value in changes.items():
        set_field(config, path, value)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        check(config, tmp_path)


def test_texts_learned_beside_ppo_must_fit_its_microbatches(config, tmp_path):
    config.phases, config.sft_model_path, config.reward.path = ("ppo",), config.model.path, config.model.path
    config.ppo.ptx_coef, config.data.sft_batch_size = 1.0, 15
    with pytest.raises(ValueError, match=r"sft_batch_size=15 texts .* cannot be spread over the 2 microbatches"):
        check(config, tmp_path)


def test_what_overwriting_would_delete_is_no_input(config, tmp_path):
    workdir = tmp_path / "run"
    config.sft_model_path, config.phases = str(workdir / "sft" / "model"), ("sft",)
    with pytest.raises(ValueError, match=r"config.sft_model_path=.* lies in .*run/sft, which --overwrite deletes"):
        check_run(run_config(config), workdir, overwrite=True)
    config.sft_model_path = None
    check_run(run_config(config), workdir, overwrite=True)
    (workdir / "reward" / "model").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"run/reward was made from what .* --config.phases=sft,reward repeats it too"):
        check_run(run_config(config), workdir, overwrite=True)


@pytest.mark.parametrize("step", [0, 1, 2])
def test_ctrl_c_after_the_last_part_leaves_a_finished_phase(step, tmp_path):
    """Pressed in a step, it cuts the phase short; pressed when nothing is left to begin, the phase is finished."""

    def press():
        with Record(tmp_path / "sft", LogConfig()) as record:
            for index in record.steps(2):
                if index == step:
                    signal.raise_signal(signal.SIGINT)
            if record.goes_on() and step == 2:
                signal.raise_signal(signal.SIGINT)
            record.summary({})

    with pytest.raises(KeyboardInterrupt):
        press()
    assert status(tmp_path, "sft") == ("finished" if step == 2 else "interrupted")


def test_a_reward_model_of_another_vocabulary(config, tmp_path):
    config.reward.path = tiny.checkpoint(tmp_path / "small", vocabulary=20)
    with pytest.raises(ValueError, match=r"config.reward.path=.* has another vocabulary than config.model.path"):
        check(config, tmp_path)


def test_a_later_phase_s_broken_row_stops_the_run_at_its_start(config, tmp_path):
    rows = [json.loads(line) for line in Path(config.data.paths[0]).read_text().splitlines()]
    rows[41]["rejected"] = rows[41]["chosen"]  # the SFT phase would not notice
    config.data.paths = (data.write(tmp_path / "broken.jsonl", rows),)
    with pytest.raises(ValueError, match=r"broken.jsonl, line 42: chosen and rejected are the same"):
        check(config, tmp_path)


def test_a_workdir_belongs_to_one_config(config, tmp_path):
    open_workdir(tmp_path / "run", config, ("sft",), overwrite=False)
    config.phases, config.log.table_rows = ("ppo",), 1  # what may differ
    open_workdir(tmp_path / "run", config, ("sft",), overwrite=False)
    config.data.max_tokens = 21
    with pytest.raises(ValueError, match=r"config.data.max_tokens was 20 and is 21"):
        open_workdir(tmp_path / "run", config, ("sft",), overwrite=False)
    open_workdir(tmp_path / "run", config, ("sft",), overwrite=True)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"]["max_tokens"] == 21


def test_a_failure_saves_what_was_trained(tmp_path):
    saved = []

    def fail():
        with Record(tmp_path / "sft", LogConfig()) as record, record.saving(lambda: saved.append(1)):
            record.metrics(1, {"loss": float("nan")})
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert saved == [1]
    assert json.loads((tmp_path / "sft" / "metrics.jsonl").read_text())["loss"] is None
    assert status(tmp_path, "sft") == "new"


def test_weights_and_biases_must_be_installed(tmp_path):
    with pytest.raises(ValueError, match="pip install wandb"):
        Record(tmp_path, LogConfig(wandb_project="x"))


def test_control_characters_do_not_reach_the_terminal():
    assert printable("a\x1b[31mb\nc" + "d" * 300, 12) == "a [31mb cdd…"
