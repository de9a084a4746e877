"""Every config can be loaded and run, and the commented ones name every field."""

import importlib
import re

import pytest

from jax_rlhf.config import default_config, run_config
from jax_rlhf.data import DataConfig
from jax_rlhf.hub.model_config import ModelConfig
from jax_rlhf.optim.optimizer import OptimizerConfig
from jax_rlhf.parallel import MeshConfig
from jax_rlhf.ppo.config import CriticConfig, FrozenConfig, PPOConfig
from jax_rlhf.reward.config import RewardConfig
from jax_rlhf.runtime.checkpoint import CheckpointConfig
from jax_rlhf.runtime.run_logger import LogConfig
from jax_rlhf.sft.config import SFTConfig
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


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("sft", (SFTConfig, DataConfig, ModelConfig, MeshConfig, LogConfig, OptimizerConfig, CheckpointConfig)),
        ("reward", (RewardConfig,)),
        ("ppo", (PPOConfig, CriticConfig, FrozenConfig)),
    ],
)
def test_the_commented_configs_explain_every_field(name, kinds):
    text = (ROOT / "configs" / f"{name}.py").read_text()
    others = {"reward_batch_size", "ppo_batch_size"}  # stand in the config of their phase
    for field in (name for kind in kinds for name in kind.__annotations__):  # those of its own, not of its parent
        if field in ("optimizer", "actor_optimizer", "critic_optimizer", "seed") or field in others:
            continue
        assert any(re.search(rf"\.{field} = ", line) for line in text.splitlines()), f"{name}.py lacks {field}"
    for line in text.splitlines():
        setting = line.strip().removeprefix("# ")
        if re.match(r"\w+(\.\w+)+ = ", setting):  # columns, beta1 and beta2 speak for themselves
            assert "  #" in setting or re.search(r"_column|beta|optimizer|paths = |ppo\.top_p", setting), line


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
