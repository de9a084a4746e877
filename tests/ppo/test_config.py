"""A config from outside becomes settings, or an error that says which field and what would do."""

import dataclasses

import pytest

from jax_rlhf.ppo.config import PPOConfig
from jax_rlhf.settings import from_mapping


def test_a_mapping_overrides_the_defaults():
    config = from_mapping(
        PPOConfig,
        {"kl_coef": 1, "eos_ids": [2, 3], "reward_clip": None, "actor_optimizer": {"learning_rate": 1e-3}},
        "config.ppo",
    )
    assert config == dataclasses.replace(
        PPOConfig(),
        kl_coef=1.0,
        eos_ids=(2, 3),
        actor_optimizer=dataclasses.replace(PPOConfig().actor_optimizer, learning_rate=1e-3),
    )
    assert from_mapping(PPOConfig, config) is config
    assert hash(config) == hash(dataclasses.replace(config))  # a static argument of jit


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kl_coeff": 0.1}, r"config\.ppo\.kl_coeff: there is no such field; did you mean kl_coef"),
        ({"zzz": 0.1}, "the fields are actor_optimizer, "),
        ({"actor_optimizer": {"lr": 1.0}}, r"config\.ppo\.actor_optimizer\.lr: there is no such field"),
        ({"ppo_epochs": 1.5}, r"config\.ppo\.ppo_epochs=1\.5: int is expected"),
        ({"ppo_epochs": True}, "int is expected"),
        ({"kl_coef": "0.1"}, "float is expected"),
        ({"kl_coef": True}, "float is expected"),
        ({"kl_kind": "k4"}, "kl_kind='k4'"),
        ({"policy_loss": "ppo"}, "policy_loss='ppo'"),
        ({"eos_ids": 2}, "eos_ids=2"),
        ({"reward_clip": "5"}, "float or None is expected"),
        ({"ppo_epochs": 0}, "ppo_epochs=0 must be 1 or more"),
        ({"gamma": 1.1}, r"gamma=1\.1"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"kl_target": 0.0}, "kl_target"),
        ({"entropy_target": 2.0}, "set entropy_coef"),
        ({"kl_target": 6.0, "kl_coef": 0.0}, "kl_target=6.0 adapts kl_coef by factors: start it above 0"),
        ({"dual_clip": 1.0}, "dual_clip"),
        ({"clip_range": -0.1}, "clip_range"),
        ({"value_clip_range": -0.1}, "value_clip_range"),
        ({"kl_horizon": 0.0}, "kl_horizon"),
        ({"microbatch_size": 0}, "microbatch_size"),
        ({"logprob_chunk": 0}, "logprob_chunk"),
        ({"ptx_coef": -1.0}, "ptx_coef"),
        ({"reward_clip": -1.0}, "reward_clip"),
        (3, "config.ppo must be a mapping"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        from_mapping(PPOConfig, values, "config.ppo")
