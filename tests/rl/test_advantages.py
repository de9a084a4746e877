"""GAE against the plain loop, and what it must not see."""

from inspect import unwrap

import jax
import numpy as np
import pytest

from jax_rlhf import rl
from tests.rl import oracle

RANDOM = np.random.RandomState(0)
REWARDS, VALUES = RANDOM.randn(6, 7), RANDOM.randn(6, 7)
MASK = np.array(
    [
        [1, 1, 1, 1, 1, 1, 1],
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0],
        [0, 1, 0, 1, 1, 0, 1],  # steps in the middle that are passed over
        [0, 0, 0, 0, 0, 0, 1],
    ],
    bool,
)
BOOTSTRAP = RANDOM.randn(6)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
@pytest.mark.parametrize("bootstrap", [None, BOOTSTRAP])
@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f])
def test_gae_is_the_oracles(gamma, lam, bootstrap, wrap):
    with jax.enable_x64(True):
        ours = wrap(lambda r, v, m: rl.gae(r, v, m, gamma=gamma, lam=lam, bootstrap=bootstrap))(REWARDS, VALUES, MASK)
    for row in range(6):
        end = 0.0 if bootstrap is None else bootstrap[row]
        wanted = oracle.gae(REWARDS[row], VALUES[row], MASK[row], gamma, lam, end)
        np.testing.assert_allclose([ours[0][row], ours[1][row]], wanted, atol=1e-12)


def test_any_leading_shape():
    one = rl.gae(*(x[4].astype(np.float32) for x in (REWARDS, VALUES)), MASK[4])
    cube = rl.gae(*(x.astype(np.float32).reshape(2, 3, 7) for x in (REWARDS, VALUES)), MASK.reshape(2, 3, 7))
    np.testing.assert_allclose(np.asarray(cube[0]).reshape(6, 7)[4], one[0], atol=1e-6)


def check_that_passed_over_steps_have_no_effect(gae):
    """Row 4 with its gaps, against its real steps alone, whatever stands in the gaps."""
    mask = MASK[4]
    gaps = np.where(mask, REWARDS[4], np.nan), np.where(mask, VALUES[4], np.nan)
    advantages, returns = gae(*gaps, mask)
    alone = gae(REWARDS[4][mask], VALUES[4][mask], np.ones(4, bool))
    np.testing.assert_allclose(np.asarray(advantages)[mask], alone[0], atol=1e-6)
    np.testing.assert_allclose(np.asarray(returns)[mask], alone[1], atol=1e-6)
    assert not np.asarray(advantages)[~mask].any()
    assert not np.asarray(returns)[~mask].any()


def test_masked_steps_are_passed_over():
    check_that_passed_over_steps_have_no_effect(rl.gae)

    def zeroing(rewards, values, mask):  # the usual mistake: a masked step counts as a step of reward and value 0
        return rl.gae(np.where(mask, rewards, 0), np.where(mask, values, 0), np.ones_like(mask))

    with pytest.raises(AssertionError):
        check_that_passed_over_steps_have_no_effect(zeroing)


def test_without_a_word_gamma_is_1_and_lambda_is_0_95():
    for ours, stated in zip(
        rl.gae(REWARDS, VALUES, MASK), rl.gae(REWARDS, VALUES, MASK, gamma=1.0, lam=0.95), strict=True
    ):
        np.testing.assert_array_equal(ours, stated)


def test_a_bootstrap_is_what_one_more_step_would_have_said():
    """With λ = 1 the return of a row that goes on is its rewards plus the value at its end."""
    mask = np.ones(3, bool)
    rewards, values = np.array([1.0, 2, 3], np.float32), np.zeros(3, np.float32)
    _, returns = rl.gae(rewards, values, mask, gamma=1.0, lam=1.0, bootstrap=np.array(10, np.float32))
    np.testing.assert_allclose(returns, [16, 15, 13])


def test_integer_rewards_and_float_masks_are_errors():
    """Fractional scores were once cut to integers by `zeros_like(ids)`: here an integer array is refused."""
    with pytest.raises(AssertionError):
        unwrap(rl.gae)(REWARDS.astype(int), VALUES, MASK)
    with pytest.raises(AssertionError):
        unwrap(rl.gae)(REWARDS, VALUES, MASK.astype(float))
    with pytest.raises(AssertionError):
        unwrap(rl.gae)(REWARDS, VALUES[:, :-1], MASK)
