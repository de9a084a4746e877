"""Reward functions: what they are given, how they are summed, and what is said where they are wrong."""

import threading
import time

import numpy as np
import pytest

from jax_rlhf import RewardError, RewardFunction
from jax_rlhf.rewards import Failures, OnFailure, score_texts

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


class Flaky:
    """Fails in its first calls."""

    def __init__(self, *failures):
        self.failures = list(failures)

    def __call__(self, prompts, responses, **columns):
        return self.failures.pop(0)() if self.failures else length(prompts, responses)


def raising(error):
    def fail():
        raise error

    return fail


def scored(function, *, timeout=0.3, **how):
    failures = Failures()
    functions = [RewardFunction(function, timeout=timeout, weight=2.0), RewardFunction(length)]
    return score_texts(functions, PROMPTS, RESPONSES, {}, OnFailure(**how), failures), failures


FAULTS = {
    "exception": raising(OSError("the judge is not at home")),
    "exit": raising(SystemExit(3)),
    "time-out": lambda: time.sleep(30),
    "nan": lambda: [0.5, float("nan"), 0.5],
    "count": lambda: [1.0],
    "no numbers": lambda: "good",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_call_that_fails_is_repeated(fault, caplog):
    scores, failures = scored(Flaky(FAULTS[fault], FAULTS[fault]), retries=2)
    np.testing.assert_allclose(scores, 3 * np.array([0.5, 1.0, 3.0]))  # weights 2 and 1
    assert failures == Failures(failed_calls=2, timeouts=2 if fault == "time-out" else 0, penalized=0)
    assert "Attempt 1 of 3" in caplog.text
    assert "Attempt 2 of 3" in caplog.text


@pytest.mark.parametrize("fault", FAULTS)
def test_one_that_goes_on_failing_is_fatal_or_costs_its_responses_the_penalty(fault, caplog):
    with pytest.raises(RewardError):
        scored(Flaky(*[FAULTS[fault]] * 3), retries=2)
    scores, failures = scored(Flaky(*[FAULTS[fault]] * 3), retries=2, then="penalize", score=-7.0)
    lost = [1] if fault == "nan" else [0, 1, 2]  # the others have a score
    np.testing.assert_array_equal(np.flatnonzero(scores == -7.0), lost)
    if fault == "nan":
        np.testing.assert_allclose(scores[[0, 2]], [2 * 0.5 + 0.5, 2 * 0.5 + 3.0])
    assert failures.penalized == len(lost)
    assert failures.failed_calls == 3
    assert "without a score get -7" in caplog.text
    if fault in ("nan", "count"):
        assert repr(RESPONSES[0 if fault == "count" else 1]) in caplog.text


def test_the_place_of_an_exception_is_said():
    with pytest.raises(RewardError, match=r"OSError: the judge is not at home \(.*test_functions.py, line \d+\)"):
        scored(Flaky(FAULTS["exception"]))


def test_a_slow_function_never_blocks_for_ever():
    """Nor does it fill the process with threads."""
    release = threading.Event()

    def hangs(prompts, responses, **columns):
        release.wait()

    started = time.time()
    scores, failures = scored(hangs, timeout=0.01, retries=40, then="penalize")
    assert time.time() - started < 10
    assert (failures.failed_calls, failures.timeouts) == (41, 16)
    assert threading.active_count() < 40
    assert np.all(scores == -1)
    release.set()
