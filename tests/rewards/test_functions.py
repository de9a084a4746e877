"""Reward functions: what they are given, how they are summed, and what is said where they are wrong."""

import numpy as np
import pytest

from jax_rlhf import RewardError, RewardFunction
from jax_rlhf.rewards import score_texts

PROMPTS, RESPONSES = ["one", "two", "three"], ["a", "bb", "<odd>\n"]


def length(prompts, responses, **columns):
    return [0.5 * len(response) for response in responses]


def matches(prompts, responses, answer, **columns):
    return np.array([float(response == given) for response, given in zip(responses, answer, strict=True)])


def test_functions_get_texts_and_columns_and_are_summed_with_weights():
    functions = [RewardFunction(length), RewardFunction(matches, weight=-2.0)]
    scores = score_texts(functions, PROMPTS, RESPONSES, {"answer": ["a", "b", "c"], "id": [1, 2, 3]})
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, [0.5 - 2.0, 1.0, 3.0])


def returning(value):
    def named(prompts, responses, **columns):
        return value

    return named


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([0.1, 0.2], r"'named' returned shape \[2\] for 3 responses.*'a'"),
        (np.zeros((3, 1)), r"returned shape \[3, 1\]"),
        (0.5, r"returned shape \[\]"),
        ([0.1, float("nan"), 0.3], "returned nan for 1 of 3 responses, first for row 1: prompt 'two', response 'bb'"),
        ([0.1, 0.2, float("inf")], r"returned inf .* row 2: prompt 'three', response '<odd>\\n'"),
        ([0.1, None, 0.2], "returned nan for 1 of 3 responses, first for row 1"),
        (["good", "bad", "bad"], "'named' failed, or did not return numbers: ValueError"),
        (None, r"returned shape \[\]"),
        ([0.1, [0.2], 0.3], "did not return numbers"),
    ],
)
def test_what_is_no_reward_is_named_with_its_text(value, message):
    with pytest.raises(RewardError, match=message):
        score_texts([RewardFunction(returning(value))], PROMPTS, RESPONSES, {})


def test_a_missing_column_and_another_name():
    with pytest.raises(RewardError, match=r"'exact' failed.*answer.*called as exact\(prompts, responses, id=…\)"):
        score_texts([RewardFunction(matches, name="exact")], PROMPTS, RESPONSES, {"id": [1, 2, 3]})
    unnamed = RewardFunction(type("Judge", (), {"__call__": lambda self, p, r, **c: [np.nan] * 3})())
    with pytest.raises(RewardError, match="'Judge' returned nan for 3 of 3"):
        unnamed(PROMPTS, RESPONSES, {})
