"""The invariants of PPO hold, without NaN, for all lengths and masks of a batch.

Rows have 1 to 5 prompt tokens and 0 to 6 response tokens. The pad id is the EOS id, and a prompt may contain EOS.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as some
from hypothesis.extra import numpy as arrays

from jax_rlhf import Experience, PPOTrainer, Prompts, RLHFEngine
from jax_rlhf.ppo.step import with_advantages
from jax_rlhf.rl import FrozenActivations, check_experience, masked_mean
from tests.ppo import tiny

B, P, R, EOS = 4, 5, 6, tiny.EOS

few = pytest.mark.parametrize("examples", [60, pytest.param(3000, marks=pytest.mark.slow)])


def held(examples, check, **strategies):
    quiet = list(HealthCheck)
    checked = settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=quiet
    )
    checked(given(**strategies)(check))()


def numbers(low, high, shape=(B, R)):
    return arrays.arrays(np.float32, shape, elements=some.floats(low, high, width=32))


@some.composite
def prompts(draw):
    lengths = np.array(draw(some.lists(some.integers(1, P), min_size=B, max_size=B)))
    mask = np.arange(P) >= P - lengths[:, None]
    tokens = draw(arrays.arrays(np.int32, (B, P), elements=some.integers(0, tiny.VOCAB - 1)))
    return Prompts(np.where(mask, tokens, EOS).astype(np.int32), mask, np.arange(B, dtype=np.int32))


@some.composite
def experiences(draw):
    """Random experience with the extremes of a long run: tiny probabilities, large values, empty responses."""
    asked = draw(prompts())
    lengths = np.array(draw(some.lists(some.integers(0, R), min_size=B, max_size=B)))
    ended = np.array(draw(some.lists(some.booleans(), min_size=B, max_size=B))) & (lengths > 0)
    ended |= (lengths < R) & (lengths > 0)  # a response without EOS fills all slots
    mask = np.arange(R) < lengths[:, None]
    tokens = np.full((B, R), EOS, np.int32)
    tokens[mask] = 3  # any token but EOS
    tokens[np.arange(B)[ended], lengths[ended] - 1] = EOS
    zeroed = lambda array: np.where(mask, array, 0).astype(np.float32)  # noqa: E731
    logprobs = zeroed(draw(numbers(-1e4, 0)))
    return Experience(
        tokens=np.concatenate([asked.tokens, tokens], axis=1),
        prompt_mask=asked.mask,
        response_mask=mask,
        logprobs=logprobs,
        sampler_logprobs=logprobs,
        ref_logprobs=zeroed(draw(numbers(-1e4, 0))),
        values=zeroed(draw(numbers(-1e4, 1e4))),
        rewards=zeroed(0),
        advantages=zeroed(0),
        returns=zeroed(0),
        scores=draw(numbers(-1e4, 1e4, (B,))),
        ended=ended,
        kept_mass=zeroed(1),
        frozen_activations=FrozenActivations(),
    )


how_scored = some.builds(
    tiny.ppo_config,
    kl_kind=some.sampled_from(["k1", "k2", "abs"]),
    kl_reduction=some.sampled_from(["sum", "mean"]),
    reward_clip=some.sampled_from([None, 2.5]),
    missing_eos_penalty=some.sampled_from([0.0, 1.5]),
    truncation=some.sampled_from(["terminal", "bootstrap"]),
    whiten_rewards=some.booleans(),
    whiten_advantages=some.booleans(),
    gamma=some.sampled_from([1.0, 0.9, 0.0]),
    lam=some.sampled_from([1.0, 0.95, 0.0]),
)

advantages_of = jax.jit(with_advantages, static_argnums=0)


def padded(experience, columns):
    """The experience with more pad tokens at the end of each row."""
    longer = {
        field.name: np.pad(value, ((0, 0), (0, columns)))
        for field in dataclasses.fields(experience)
        if isinstance(value := getattr(experience, field.name), np.ndarray) and value.shape == (B, R)
    }
    tokens = np.pad(experience.tokens, ((0, 0), (0, columns)), constant_values=EOS)
    return experience.replace(tokens=tokens, **longer)


@few
def test_rewards_and_advantages_satisfy_their_invariants(examples):
    beta = np.float32(0.1)

    def check(made, config, last):
        done = jax.tree.map(np.asarray, advantages_of(config, made, last, beta))
        check_experience(done)
        mask, real = made.response_mask, made.response_mask.any(axis=1)
        if not config.reward.whiten and config.kl.kind == "k1" and config.kl.reduction == "sum":
            score = made.scores if config.reward.clip is None else np.clip(made.scores, -2.5, 2.5)
            score = score - config.reward.missing_eos_penalty * ~made.ended
            kl = np.sum(made.logprobs.astype(np.float64) - made.ref_logprobs, axis=1)
            size = 1e-5 * (np.abs(score) + np.abs(made.logprobs - made.ref_logprobs).sum(axis=1)) + 1e-5
            assert np.all(np.abs(np.sum(done.rewards, axis=1) - (score - beta * kl))[real] <= size[real])
        assert np.all(done.rewards[~real] == 0)
        if config.whiten_advantages and mask.sum() > 1:
            assert abs(float(masked_mean(jnp.asarray(done.advantages), jnp.asarray(mask)))) < 1e-2
        elif not config.whiten_advantages:
            returns = np.where(mask, done.advantages + made.values, 0)
            tiny_number = np.finfo(np.float32).tiny  # XLA flushes smaller numbers to 0
            np.testing.assert_allclose(done.returns, returns, rtol=0, atol=tiny_number)
        longer = jax.tree.map(np.asarray, advantages_of(config, padded(made, 3), last, beta))
        for name in ("rewards", "advantages", "returns"):
            value = getattr(done, name)
            size = 1e-4 * max(1.0, float(np.abs(value).max()))
            np.testing.assert_allclose(getattr(longer, name)[:, :R], value, atol=size, err_msg=name)
            assert np.all(getattr(longer, name)[:, R:] == 0)

    held(examples, check, made=experiences(), config=how_scored, last=numbers(-1e3, 1e3, (B,)))


def trainer(loss):
    options = {
        "max_new_tokens": R,
        "eos_ids": (EOS,),
        "pad_id": EOS,
        "ppo_epochs": 2,
        "num_minibatches": 2,
        "policy_loss": loss,
        "ema_decay": 0.5,
        "kl_target": 1.0,
        "entropy_coef": 0.01,
        "time_phases": False,
    }
    return PPOTrainer(RLHFEngine(tiny.policy(), reward=tiny.policy(3, head="scalar")), tiny.nested(**options))


@few
@pytest.mark.parametrize("loss", ["clip", "penalty"])
def test_an_iteration_satisfies_its_invariants(examples, loss):
    ppo = trainer(loss)
    start = jax.tree.map(np.array, (ppo.engine.params.trainable, ppo.state))

    def check(asked, empty):
        trainable, ppo.state = jax.device_put(start)
        ppo.engine.params = ppo.engine.params.replace(trainable=trainable)
        made = ppo.generate_experience(asked)
        check_experience(jax.tree.map(np.asarray, made))
        tokens, mask = np.asarray(made.tokens[:, P:]), np.asarray(made.response_mask)
        for row, real in zip(tokens, mask, strict=True):  # real tokens up to and including the first EOS, then pads
            ends = np.flatnonzero(row == EOS)
            length = ends[0] + 1 if len(ends) else R
            assert real.tolist() == [True] * length + [False] * (R - length)
            assert np.all(row[length:] == EOS)
        assert np.array_equal(np.asarray(made.tokens[:, :P])[asked.mask], asked.tokens[asked.mask])
        if empty:  # a row without a response
            none = jnp.arange(B)[:, None] == 1
            names = ("logprobs", "ref_logprobs", "sampler_logprobs", "values", "advantages", "returns", "rewards")
            emptied = {name: jnp.where(none, 0, getattr(made, name)) for name in names}
            made = made.replace(response_mask=made.response_mask & ~none, **emptied)
        metrics = ppo.train_rlhf(made)
        assert all(np.isfinite(value) for name, value in metrics.items()), metrics
        assert metrics["objective/kl"] == 0  # the actor still equals the reference
        assert metrics["val/first_ratio_gap"] < 1e-5
        assert metrics["val/sampler_logprob_gap"] < 1e-4
        assert metrics["val/skipped_updates"] == metrics["val/bad_steps"] == 0
        assert metrics["val/updates"] == 4
        for leaf in jax.tree.leaves((ppo.engine.params.trainable, ppo.state)):
            assert np.all(np.isfinite(leaf))

    held(examples, check, asked=prompts(), empty=some.booleans())
