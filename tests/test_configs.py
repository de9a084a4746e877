"""Every config can be loaded, and has valid settings."""

import importlib

import pytest

from jax_rlhf.config import default_config, run_config
from tests.processes import ROOT

NAMES = sorted(file.stem for file in (ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_a_config_loads_and_its_docstring_has_the_command(name):
    module = importlib.import_module(f"configs.{name}")
    settings = run_config(module.get_config())
    assert settings.model.path is not None
    assert f"--config=configs/{name}.py" in module.__doc__


def test_the_defaults_of_ppo_have_the_expected_values():
    ppo = run_config(default_config()).ppo
    assert (ppo.sampling.temperature, ppo.loss.clip_range, ppo.lam, ppo.gamma, ppo.whiten_advantages) == (
        1.0,
        0.2,
        0.95,
        1.0,
        True,
    )


def test_the_seed_of_ppo_defaults_to_the_seed_of_the_run():
    config = default_config()
    config.seed = 7
    assert run_config(config).ppo.seed == 7
    config.ppo.seed = 8
    assert run_config(config).seed == 7


def test_the_quickstarts_reward_start_follows_the_model_unless_set():
    config = importlib.import_module("configs.quickstart").get_config()
    config.model.path = "x"
    assert run_config(config).reward.start_from == "x"
    config.reward.start_from = None
    assert run_config(config).model.path == "x"
    assert run_config(config).reward.start_from is None
