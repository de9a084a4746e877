"""A mapping becomes a config, or an error that names the field and what is valid."""

import dataclasses
import math

import pytest

from jax_rlhf.ppo.config import PPOConfig
from jax_rlhf.settings import from_mapping, new_name
from tests.ppo import tiny


def test_a_mapping_overrides_the_defaults():
    values = {
        "kl": {"coef": 1},
        "sampling": {"eos_ids": [2, 3]},
        "reward": {"clip": None},
        "actor": {"optimizer": {"learning_rate": 1e-3}},
    }
    config, plain = from_mapping(PPOConfig, values, "config.ppo"), PPOConfig()
    optimizer = dataclasses.replace(plain.actor.optimizer, learning_rate=1e-3)
    assert config == dataclasses.replace(
        plain,
        kl=dataclasses.replace(plain.kl, coef=1.0),
        sampling=dataclasses.replace(plain.sampling, eos_ids=(2, 3)),
        actor=dataclasses.replace(plain.actor, optimizer=optimizer),
    )
    assert from_mapping(PPOConfig, config) is config
    assert hash(config) == hash(dataclasses.replace(config))  # a static argument of jit


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kl": {"coeff": 0.1}}, r"config\.ppo\.kl\.coeff does not exist; did you mean coef"),
        ({"zzz": 0.1}, "the fields are actor, "),
        ({"actor": {"optimizer": {"lr": 1.0}}}, r"config\.ppo\.actor\.optimizer\.lr does not exist"),
        ({"kl_coef": 0.1}, r"config\.ppo\.kl_coef does not exist; it is now config\.ppo\.kl\.coef"),
        ({"actor_optimizer": {"learning_rate": 0.1}}, r"it is now config\.ppo\.actor\.optimizer"),
        ({"ppo_epochs": 1.5}, r"config\.ppo\.ppo_epochs=1\.5: expected int"),
        ({"ppo_epochs": True}, "expected int"),
        ({"kl": {"coef": "0.1"}}, "expected float"),
        ({"kl": {"coef": True}}, "expected float"),
        ({"kl": {"kind": "k4"}}, r"kl\.kind='k4'"),
        ({"loss": {"policy": "ppo"}}, r"loss\.policy='ppo'"),
        ({"sampling": {"eos_ids": 2}}, "eos_ids=2"),
        ({"reward": {"clip": "5"}}, "expected float or None"),
        ({"ppo_epochs": 0}, "ppo_epochs=0 must be 1 or more"),
        ({"gamma": 1.1}, r"gamma=1\.1"),
        ({"actor": {"ema_decay": 1.0}}, "ema_decay"),
        ({"kl": {"target": 0.0}}, r"kl\.target"),
        ({"loss": {"entropy_target": 2.0}}, "set entropy_coef"),
        (
            {"kl": {"target": 6.0, "coef": 0.0}},
            r"kl\.target=6\.0 multiplies config\.ppo\.kl\.coef by factors: start it above 0",
        ),
        ({"loss": {"dual_clip": 1.0}}, "dual_clip"),
        ({"loss": {"clip_range": -0.1}}, "clip_range"),
        ({"loss": {"value_clip_range": -0.1}}, "value_clip_range"),
        ({"kl": {"horizon": 0.0}}, r"kl\.horizon"),
        ({"microbatch_size": 0}, "microbatch_size"),
        ({"logprob_chunk": 0}, "logprob_chunk"),
        ({"loss": {"ptx_coef": -1.0}}, "ptx_coef"),
        ({"reward": {"clip": -1.0}}, r"reward\.clip"),
        (3, "config.ppo must be a mapping"),
    ],
)
def test_errors_name_the_invalid_field(values, message):
    with pytest.raises(ValueError, match=message):
        from_mapping(PPOConfig, values, "config.ppo")


def test_clip_ranges_depend_on_the_policy_loss():
    assert tiny.ppo_config(clip_range=0.1).loss.clip_ranges == (0.1, 0.1)
    assert tiny.ppo_config(clip_range=0.1, clip_range_high=0.3).loss.clip_ranges == (0.1, 0.3)
    assert tiny.ppo_config(policy_loss="penalty").loss.clip_ranges == (math.inf, math.inf)


@pytest.mark.parametrize(
    ("former", "now"),
    [
        ("ppo.kl_coef", "ppo.kl.coef"),
        ("ppo.actor_optimizer.eps", "ppo.actor.optimizer.eps"),
        ("reward_training.path", "reward.start_from"),
        ("reward_training.optimizer.eps", "reward.optimizer.eps"),
        ("reward_training", "reward"),
        ("reward.offload", "reward_model.offload"),
        ("ppo.kl_coefficient", None),
        ("ppo.kl.coef", None),
        ("reward.steps", None),
    ],
)
def test_old_setting_names_map_to_new_ones(former, now):
    assert new_name(former) == now
