"""GAE equals a plain loop, and masked steps do not affect it."""

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
        [0, 1, 0, 1, 1, 0, 1],  # masked steps in the middle
        [0, 0, 0, 0, 0, 0, 1],
    ],
    bool,
)
BOOTSTRAP = RANDOM.randn(6)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
@pytest.mark.parametrize("bootstrap", [None, BOOTSTRAP])
@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f])
def test_gae_equals_the_oracle(gamma, lam, bootstrap, wrap):
    with jax.enable_x64(True):
        ours = wrap(lambda r, v, m: rl.gae(r, v, m, gamma=gamma, lam=lam, bootstrap=bootstrap))(REWARDS, VALUES, MASK)
    for row in range(6):
        end = 0.0 if bootstrap is None else bootstrap[row]
        wanted = oracle.gae(REWARDS[row], VALUES[row], MASK[row], gamma, lam, end)
        np.testing.assert_allclose([ours[0][row], ours[1][row]], wanted, atol=1e-12)


def test_gae_accepts_any_leading_shape():
    one = rl.gae(*(x[4].astype(np.float32) for x in (REWARDS, VALUES)), MASK[4])
    cube = rl.gae(*(x.astype(np.float32).reshape(2, 3, 7) for x in (REWARDS, VALUES)), MASK.reshape(2, 3, 7))
    np.testing.assert_allclose(np.asarray(cube[0]).reshape(6, 7)[4], one[0], atol=1e-6)


def check_that_passed_over_steps_have_no_effect(gae):
    """Row 4, with NaN at its masked steps, must give the same as its real steps alone."""
    mask = MASK[4]
    gaps = np.where(mask, REWARDS[4], np.nan), np.where(mask, VALUES[4], np.nan)
    advantages, returns = gae(*gaps, mask)
    alone = gae(REWARDS[4][mask], VALUES[4][mask], np.ones(4, bool))
    np.testing.assert_allclose(np.asarray(advantages)[mask], alone[0], atol=1e-6)
    np.testing.assert_allclose(np.asarray(returns)[mask], alone[1], atol=1e-6)
    assert not np.asarray(advantages)[~mask].any()
    assert not np.asarray(returns)[~mask].any()


def test_masked_steps_do_not_affect_gae():
    check_that_passed_over_steps_have_no_effect(rl.gae)

    def zeroing(rewards, values, mask):  # a common mistake: a masked step counts as a step of reward and value 0
        return rl.gae(np.where(mask, rewards, 0), np.where(mask, values, 0), np.ones_like(mask))

    with pytest.raises(AssertionError):
        check_that_passed_over_steps_have_no_effect(zeroing)


def test_gamma_defaults_to_1_and_lambda_to_0_95():
    for ours, stated in zip(
        rl.gae(REWARDS, VALUES, MASK), rl.gae(REWARDS, VALUES, MASK, gamma=1.0, lam=0.95), strict=True
    ):
        np.testing.assert_array_equal(ours, stated)


def test_the_bootstrap_value_is_added_to_the_returns():
    """With γ = λ = 1, a return is the sum of the remaining rewards plus the bootstrap value."""
    mask = np.ones(3, bool)
    rewards, values = np.array([1.0, 2, 3], np.float32), np.zeros(3, np.float32)
    _, returns = rl.gae(rewards, values, mask, gamma=1.0, lam=1.0, bootstrap=np.array(10, np.float32))
    np.testing.assert_allclose(returns, [16, 15, 13])


def test_integer_rewards_float_masks_and_unequal_shapes_are_errors():
    """An integer array, such as `zeros_like(ids)`, would truncate fractional rewards."""
    with pytest.raises(AssertionError):
        unwrap(rl.gae)(REWARDS.astype(int), VALUES, MASK)
    with pytest.raises(AssertionError):
        unwrap(rl.gae)(REWARDS, VALUES, MASK.astype(float))
    with pytest.raises(AssertionError):
        unwrap(rl.gae)(REWARDS, VALUES[:, :-1], MASK)
