"""Every config can be loaded and run."""

import importlib

import pytest

from jax_rlhf.config import default_config, run_config
from tests.processes import ROOT

NAMES = sorted(file.stem for file in (ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_a_config_loads_with_every_field_of_a_known_type(name):
    module = importlib.import_module(f"configs.{name}")
    settings = run_config(module.get_config())
    assert settings.model.path is not None
    assert f"--config=configs/{name}.py" in module.__doc__


def test_defaults_are_ones_that_work():
    ppo = run_config(default_config()).ppo
    assert (ppo.sampling.temperature, ppo.loss.clip_range, ppo.lam, ppo.gamma, ppo.whiten_advantages) == (
        1.0,
        0.2,
        0.95,
        1.0,
        True,
    )


def test_seeds_follow_the_run_s():
    config = default_config()
    config.seed = 7
    assert run_config(config).ppo.seed == 7
    config.ppo.seed = 8
    assert run_config(config).seed == 7


def test_the_quickstart_takes_another_model_and_another_start_of_the_reward_model():
    config = importlib.import_module("configs.quickstart").get_config()
    config.model.path = "x"
    assert run_config(config).reward.start_from == "x"
    config.reward.start_from = None
    assert run_config(config).model.path == "x"
    assert run_config(config).reward.start_from is None
