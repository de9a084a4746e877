"""From samples to an experience: rewards, advantages and returns equal float64 loops; and the sources of scores."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jax_rlhf import RLHFEngine
from jax_rlhf.parallel import put_rows
from jax_rlhf.ppo.config import PPOConfig
from jax_rlhf.ppo.step import with_advantages
from tests.ppo import tiny
from tests.rl import oracle

LENGTHS, SLOTS = [1, 4, 7, 7, 2, 5, 7, 3], 7
ENDED = [True, True, True, False, True, True, False, True]


def scored(rows=8):
    """(experience, values of the last states): random arrays, and rows of 1 to R tokens with and without EOS."""
    made, random = tiny.trainer().generate_experience(tiny.ragged_prompts(rows)), np.random.RandomState(0)
    mask = np.arange(SLOTS) < np.array(LENGTHS)[:, None]
    per_token = [np.where(mask, random.randn(rows, SLOTS), 0).astype(np.float32) for _ in range(3)]
    made = dataclasses.replace(
        made,
        response_mask=mask,
        logprobs=per_token[0],
        ref_logprobs=per_token[1],
        values=per_token[2],
        scores=(random.randn(rows) * 3).astype(np.float32),
        ended=np.array(ENDED),
    )
    return jax.tree.map(jnp.asarray, made), jnp.asarray(random.randn(rows), jnp.float32)


def by_hand(config, made, last_values, kl_coef):
    """Rewards, advantages and returns, row by row in float64."""
    rewards, advantages, returns = np.zeros((3, *made.values.shape))
    mask = np.asarray(made.response_mask)
    for row in range(len(mask)):
        length = LENGTHS[row]
        for t in range(length):
            k1 = float(made.logprobs[row, t]) - float(made.ref_logprobs[row, t])
            kl = {"k1": k1, "k2": k1 * k1 / 2, "k3": np.exp(-k1) - 1 + k1, "abs": abs(k1)}[config.kl.kind]
            rewards[row, t] = -kl_coef * kl / (length if config.kl.reduction == "mean" else 1)
        score = float(made.scores[row])
        if config.reward.clip is not None:
            score = min(max(score, -config.reward.clip), config.reward.clip)
        rewards[row, length - 1] += score - (0 if ENDED[row] else config.reward.missing_eos_penalty)
    if config.reward.whiten:
        rewards = np.where(mask, oracle.whiten(rewards, mask, shift_mean=False), 0)
    for row in range(len(mask)):
        bootstrap = float(last_values[row]) if config.reward.truncation == "bootstrap" and not ENDED[row] else 0.0
        advantages[row], returns[row] = oracle.gae(
            rewards[row], np.asarray(made.values[row], np.float64), mask[row], config.gamma, config.lam, bootstrap
        )
    if config.whiten_advantages:
        advantages = oracle.whiten(advantages, mask)
    return {"rewards": rewards, "advantages": advantages, "returns": returns}


OPTIONS = [
    {},
    {"reward_clip": 1.0, "missing_eos_penalty": 2.5},
    {"truncation": "bootstrap", "gamma": 0.9},
    {"whiten_rewards": True, "kl_kind": "k3"},
    {"kl_reduction": "mean", "kl_kind": "k2", "whiten_advantages": False},
    {"kl_kind": "abs", "lam": 1.0},
]


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "defaults")
def test_rewards_advantages_and_returns_equal_float64_loops(options, devices):
    config = tiny.ppo_config(**options)
    made, last_values = scored()
    wanted = by_hand(config, made, last_values, 0.3)
    if devices == 8:
        mesh = Mesh(np.array(jax.devices()).reshape(8, 1), ("data", "fsdp"))
        made, last_values = put_rows(jax.device_get((made, last_values)), mesh)
    ours = jax.jit(functools.partial(with_advantages, config))(made, last_values, jnp.float32(0.3))
    for name, value in wanted.items():
        np.testing.assert_allclose(getattr(ours, name), value, atol=2e-5, err_msg=name)
    # The comparison can fail: each other set of options gives different numbers.
    for other in OPTIONS:
        if other != options:
            different = by_hand(tiny.ppo_config(**other), made, last_values, 0.3)
            assert max(np.abs(different[name] - wanted[name]).max() for name in wanted) > 0.01


def test_the_score_is_added_at_the_last_real_token():
    """For every length, the rewards of a row sum to score − β Σ kl, and scores keep their fractions."""
    made, last_values = scored()
    ours = with_advantages(PPOConfig(), made, last_values, jnp.float32(0.3))
    kl = np.asarray(made.logprobs - made.ref_logprobs)
    np.testing.assert_allclose(np.sum(ours.rewards, axis=1), made.scores - 0.3 * kl.sum(axis=1), atol=1e-5)
    np.testing.assert_allclose(
        (np.asarray(ours.rewards) + 0.3 * kl)[np.arange(8), np.array(LENGTHS) - 1], made.scores, atol=1e-5
    )
    assert np.abs(np.asarray(made.scores) - np.trunc(made.scores)).min() > 0.01  # an integer cast would show


# ---- the sources of scores -----------------------------------------------------------------------------------------


def test_a_reward_model_scores_the_sampled_ids_and_functions_are_added():
    """The score is the head's output at the last real token, less missing_eos_bias if there is no EOS."""
    reward = dataclasses.replace(tiny.policy(5, head="scalar", num_layers=1), missing_eos_bias=0.7)
    engine = RLHFEngine(tiny.policy(), critic=tiny.policy(6, head="scalar"), reward=reward)
    made = tiny.trainer(engine, reward=None).generate_experience(tiny.ragged_prompts(16))
    mask = np.concatenate([made.prompt_mask, made.response_mask], axis=1)
    values = np.asarray(jax.jit(reward.model.apply)({"params": reward.params}, made.tokens, mask=mask))
    last = np.array([np.flatnonzero(row)[-1] for row in mask])
    ended = np.asarray(made.tokens)[np.arange(16), last] == tiny.EOS
    assert 0 < np.sum(ended) < 16
    np.testing.assert_allclose(made.scores, values[np.arange(16), last] - 0.7 * ~ended, atol=1e-5)
    np.testing.assert_allclose(engine.reward(made.tokens, mask), values[np.arange(16), last], atol=1e-5)
    assert np.std(values[np.arange(16), last]) > 0.01
    both = tiny.trainer(engine, reward=tiny.fractional_reward).generate_experience(tiny.ragged_prompts(16))
    np.testing.assert_array_equal(both.tokens, made.tokens)
    texts = [
        tiny.tokenizer().decode(row[real]) for row, real in zip(made.tokens[:, 5:], made.response_mask, strict=True)
    ]
    np.testing.assert_allclose(both.scores, made.scores + np.array(tiny.fractional_reward(None, texts)), atol=1e-5)
    # Values are the critic's output for the state before each token.
    critic = tiny.policy(6, head="scalar")
    states = np.asarray(jax.jit(critic.model.apply)({"params": critic.params}, made.tokens, mask=mask))[:, 4:-1]
    np.testing.assert_allclose(made.values, np.where(made.response_mask, states, 0), atol=1e-5)


def test_critic_and_reward_model_share_frozen_layers():
    """The critic starts as the reward model. Their frozen bottom layers are stored and run once."""
    reward = tiny.policy(5, head="scalar")
    whole = tiny.trainer(RLHFEngine(tiny.policy(), reward=reward), reward=None)
    engine = RLHFEngine(tiny.policy(), reward=reward, trainable_layers=1, critic_trainable_layers=1)
    assert engine.models.reward_shares
    assert not engine.models.critic_shares
    assert engine.params.frozen.reward.frozen == {}
    made, wanted = (
        trainer.generate_experience(tiny.ragged_prompts(16)) for trainer in (tiny.trainer(engine, reward=None), whole)
    )
    assert made.frozen_activations.critic is not None
    for name in ("scores", "values", "advantages"):
        np.testing.assert_allclose(getattr(made, name), getattr(wanted, name), atol=1e-5, err_msg=name)
    # At the start the critic's value of the last state is the score.
    mask = np.concatenate([made.prompt_mask, made.response_mask], axis=1)
    last = np.array([np.flatnonzero(row)[-1] for row in mask])
    np.testing.assert_allclose(engine.values(made.tokens, mask)[np.arange(16), last], made.scores, atol=1e-5)


def test_functions_get_columns_and_texts_without_special_tokens():
    """The ids of EOS and pad come from the tokenizer, and the texts leave them out."""
    seen = {}

    def judge(prompts, responses, **columns):
        seen.update(prompts=prompts, responses=responses, **columns)
        return np.arange(4) / 4

    start = tiny.policy()
    start.tokenizer.add_special_tokens({"eos_token": tiny.WORDS[tiny.EOS], "pad_token": tiny.WORDS[tiny.EOS]})
    prompts = dataclasses.replace(tiny.ragged_prompts(4), columns={"answer": ["a", "b", "c", "d"]})
    trainer = tiny.trainer(RLHFEngine(start), reward=judge, eos_ids=None, pad_id=None)
    assert (trainer.config.sampling.eos_ids, trainer.config.sampling.pad_id) == ((tiny.EOS,), tiny.EOS)
    made = trainer.generate_experience(prompts)
    assert made.ended.any()
    assert seen["answer"] == ["a", "b", "c", "d"]
    np.testing.assert_allclose(made.scores, np.arange(4) / 4)
    for name, tokens, mask in (
        ("prompts", prompts.tokens, prompts.mask),
        ("responses", made.tokens[:, 5:], made.response_mask),
    ):
        assert seen[name] == tiny.texts(tokens, mask & (np.asarray(tokens) != tiny.EOS))
