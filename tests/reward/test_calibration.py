"""Scores of SFT responses get mean 0 and standard deviation 1, and a missing EOS earns no bonus."""

import numpy as np
import pytest

from jax_rlhf.reward.calibration import calibration


def calibrated(scores, ended):
    found = calibration(scores, ended)
    return found, found["gain"] * scores + found["bias"] - found["missing_eos_bias"] * ~ended


@pytest.mark.parametrize(("gap", "kept"), [(4.0, 0.0), (-4.0, -4.0)])
def test_a_bonus_for_a_missing_eos_is_removed_and_a_penalty_is_kept(gap, kept):
    random, ended = np.random.RandomState(0), np.arange(60) < 40
    noise = random.randn(60)
    noise[ended] -= noise[ended].mean()
    noise[~ended] -= noise[~ended].mean()
    found, scores = calibrated(3 + noise + gap * ~ended, ended)
    assert np.mean(scores) == pytest.approx(0, abs=1e-9)
    assert np.std(scores) == pytest.approx(1)
    assert np.mean(scores[~ended]) - np.mean(scores[ended]) == pytest.approx(kept * found["gain"], abs=1e-9)
    assert found["missing_eos_bias"] == pytest.approx((gap - kept) * found["gain"])


@pytest.mark.parametrize("cut", [0, 7, 53, 60])
def test_fewer_than_8_responses_of_a_kind_give_no_missing_eos_bias(cut):
    scores = np.random.RandomState(0).randn(60)
    found, after = calibrated(scores + 5.0 * (np.arange(60) < cut), np.arange(60) >= cut)
    assert found["missing_eos_bias"] == 0
    assert (np.mean(after), np.std(after)) == (pytest.approx(0, abs=1e-9), pytest.approx(1))


@pytest.mark.parametrize("cut", [8, 52])
def test_8_responses_of_each_kind_give_a_missing_eos_bias(cut):
    found, _ = calibrated(np.random.RandomState(0).randn(60) + 5.0 * (np.arange(60) < cut), np.arange(60) >= cut)
    assert found["missing_eos_bias"] > 0


def test_equal_scores_become_zero():
    found, after = calibrated(np.full(20, 2.5), np.ones(20, bool))
    assert found["gain"] == 1e6
    np.testing.assert_array_equal(after, 0)
