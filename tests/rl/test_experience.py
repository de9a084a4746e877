"""Rewards per token: the slot of the score and the KL penalty; and the checks of an `Experience`."""

from inspect import unwrap

import jax
import numpy as np
import pytest

from jax_rlhf import Experience, rl
from jax_rlhf.rl import FrozenActivations, check_experience
from tests.rl import oracle

LENGTHS = [1, 3, 5, 5]  # one token; a middle length; all slots with EOS; all slots without EOS
MASK = np.arange(5) < np.array(LENGTHS)[:, None]
SCORES = np.array([0.7, -1.3, 2.5, 0.25], np.float32)
RANDOM = np.random.RandomState(0)
LOGPROBS, REF = RANDOM.randn(4, 5).astype(np.float32), RANDOM.randn(4, 5).astype(np.float32)


def ours(scores, logprobs, ref, mask, **settings):
    return rl.token_rewards(scores, logprobs, ref, mask, kl_coef=0.3, **settings)


def check_rewards(function):
    rewards = np.asarray(function(SCORES, LOGPROBS, REF, MASK))
    wanted = [oracle.rewards(s, p, q, n, 0.3) for s, p, q, n in zip(SCORES, LOGPROBS, REF, LENGTHS, strict=True)]
    np.testing.assert_allclose(rewards, wanted, atol=1e-6)
    kl = np.where(MASK, LOGPROBS - REF, 0).sum(axis=1)
    np.testing.assert_allclose(rewards.sum(axis=1), SCORES - 0.3 * kl, atol=1e-5)


def test_scores_are_clipped_and_penalised_for_a_missing_eos():
    scores, ended = np.array([0.7, -1.3, 2.5, -0.25], np.float32), np.array([True, False, False, True])
    shaped = rl.shaped_scores(scores, ended, clip=1.0, missing_eos_penalty=0.4)
    np.testing.assert_allclose(shaped, [0.7, -1.0 - 0.4, 1.0 - 0.4, -0.25], rtol=1e-6)
    np.testing.assert_array_equal(rl.shaped_scores(scores, ended), scores)


def one_past_the_end(scores, logprobs, ref, mask):
    rewards = np.where(mask, -0.3 * (logprobs - ref), 0)
    for row, length in enumerate(mask.sum(axis=1)):
        if length < mask.shape[1]:
            rewards[row, length] += scores[row]
        else:
            rewards[row, -1] += scores[row]
    return rewards


def cast_to_ids_dtype(scores, logprobs, ref, mask):
    return ours(np.zeros_like(np.arange(4)) + scores.astype(int) * 1.0, logprobs, ref, mask)


def test_score_lands_on_the_last_real_token():
    check_rewards(ours)
    check_rewards(jax.jit(ours))
    for wrong in (one_past_the_end, cast_to_ids_dtype):
        with pytest.raises(AssertionError):
            check_rewards(wrong)


def test_a_row_without_real_tokens_has_zero_rewards():
    mask = MASK & (np.arange(4) != 1)[:, None]
    rewards = np.asarray(ours(SCORES, LOGPROBS, REF, mask))
    assert not rewards[1].any()
    assert np.isfinite(rewards).all()


def test_the_mean_kl_penalty_does_not_depend_on_the_length():
    """With equal KL per token, the summed penalty of 5 tokens is 5 times that of one, and the mean penalty is equal."""
    logprobs, ref = np.zeros((4, 5), np.float32), np.full((4, 5), -0.5, np.float32)
    zero = np.zeros(4, np.float32)
    summed = np.asarray(ours(zero, logprobs, ref, MASK)).sum(axis=1)
    mean = np.asarray(ours(zero, logprobs, ref, MASK, kl_reduction="mean")).sum(axis=1)
    np.testing.assert_allclose(summed, [-0.15, -0.45, -0.75, -0.75], atol=1e-6)
    np.testing.assert_allclose(mean, [-0.15] * 4, atol=1e-6)


def test_integer_scores_and_unknown_kl_reductions_are_errors():
    with pytest.raises(AssertionError):
        unwrap(rl.token_rewards)(SCORES.astype(int), LOGPROBS, REF, MASK, kl_coef=0.1)
    with pytest.raises(ValueError, match="median"):
        unwrap(rl.token_rewards)(SCORES, LOGPROBS, REF, MASK, kl_coef=0.1, kl_reduction="median")


def whole_experience():
    mask = np.array([[True, False, False], [True, True, True]])
    zero = np.zeros((2, 3), np.float32)
    return Experience(
        tokens=np.ones((2, 6), np.int32),
        prompt_mask=np.array([[False, True, True], [True, True, True]]),
        response_mask=mask,
        **dict.fromkeys(("logprobs", "sampler_logprobs", "ref_logprobs"), np.where(mask, -1, 0).astype(np.float32)),
        **dict.fromkeys(("values", "rewards", "advantages", "returns"), zero),
        scores=zero[:, 0],
        ended=mask[:, 2],
        kept_mass=np.where(mask, 1, 0).astype(np.float32),
        frozen_activations=FrozenActivations(),
    )


def changed(array, place, value):
    array = array.copy()
    array[place] = value
    return array


@pytest.mark.parametrize(
    ("field", "place", "value", "message"),
    [
        ("values", (0, 1), np.nan, "finite"),
        ("scores", 1, np.inf, "finite"),
        ("response_mask", (1, 1), False, "response_mask has a gap"),
        ("prompt_mask", (1, 1), False, "prompt_mask has a gap"),
        ("prompt_mask", (0, 2), False, "prompt_mask has a gap"),
        ("rewards", (0, 2), 0.5, "rewards is not 0 where"),
        ("ref_logprobs", (1, 0), 0.5, "ref_logprobs is above 0"),
    ],
)
def test_check_experience_names_the_invalid_field(field, place, value, message):
    check_experience(whole_experience())
    bad = whole_experience()
    with pytest.raises(AssertionError, match=message):
        check_experience(bad.replace(**{field: changed(getattr(bad, field), place, value)}))
