"""KL estimators compared with the exact divergence, and KL controllers compared with hand-computed values."""

from inspect import unwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_rlhf import rl

RANDOM = np.random.RandomState(0)
P, Q = (np.exp(z) / np.exp(z).sum() for z in RANDOM.randn(2, 7) * 0.7)
EXACT = float(np.sum(P * np.log(P / Q)))  # KL(P ‖ Q) in nats


def expectation(estimate):
    """The exact expectation over tokens sampled from P."""
    return float(np.sum(P * np.asarray(estimate(np.log(P), np.log(Q)))))


def check_unbiased(estimate):
    assert expectation(estimate) == pytest.approx(EXACT, rel=1e-5)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(kind):
    check_unbiased(lambda p, q: rl.kl_estimate(p, q, kind))
    with pytest.raises(AssertionError):  # with the wrong sign
        check_unbiased(lambda p, q: rl.kl_estimate(q, p, kind))


def test_k3_is_never_negative_but_k1_can_be():
    assert (np.asarray(rl.kl_estimate(np.log(P), np.log(Q), "k3")) >= 0).all()
    assert (np.asarray(rl.kl_estimate(np.log(P), np.log(Q), "k1")) < 0).any()


def test_each_estimator_follows_its_formula():
    new, ref = np.array([-1.0, -2.0, 0.0]), np.array([-1.5, -1.0, 0.0])
    wanted = {"k1": [0.5, -1, 0], "k2": [0.125, 0.5, 0], "abs": [0.5, 1, 0]}
    wanted["k3"] = [np.exp(-0.5) - 1 + 0.5, np.exp(1) - 1 - 1, 0]
    for kind, numbers in wanted.items():
        np.testing.assert_allclose(rl.kl_estimate(new, ref, kind), numbers, atol=1e-6)


def test_k3_is_finite_for_a_token_of_almost_zero_probability():
    value, gradient = jax.value_and_grad(lambda x: rl.kl_estimate(x[None], jnp.float32([-1]), "k3")[0])(
        jnp.float32(-1e4)
    )
    assert np.isfinite(value)
    assert np.isfinite(gradient)


def test_unknown_estimators_and_integer_log_probs_are_errors():
    with pytest.raises(ValueError, match="k4"):
        unwrap(rl.kl_estimate)(np.log(P), np.log(Q), "k4")
    with pytest.raises(AssertionError):
        unwrap(rl.kl_estimate)(np.ones(3, int), np.ones(3, int))


@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f])
def test_the_adaptive_kl_coefficient_follows_its_formula(wrap):
    """KL 6.6 is 10 % above the target 6, so 1,000 of 10,000 episodes raise β by 1 %. Errors are clipped to ±20 %."""
    controller = rl.AdaptiveKL(0.15, 6.0, 10_000.0)
    update = wrap(lambda kl: controller.update(kl, 1000))
    for kl, factor in [(6.6, 1.01), (60.0, 1.02), (6.0, 1.0), (0.0, 0.98), (-3.0, 0.98), (np.nan, 1.0)]:
        assert float(update(kl).value) == pytest.approx(0.15 * factor, rel=1e-6)
    assert controller.value == 0.15  # the update returns a new controller


@pytest.mark.parametrize("kl", [-1e9, 0.0, 1e9])
def test_the_adaptive_kl_coefficient_stays_positive_for_large_batches(kl):
    """For 512 episodes over a horizon of 100, 1 − 0.2 · 5.12 is negative, so the factor is limited to 0.1."""
    controller = rl.AdaptiveKL(0.15, 6.0, 100.0)
    assert float(controller.update(kl, 512).value) == pytest.approx(0.15 * (1 + 0.2 * 5.12 if kl > 6 else 0.1))
    for _ in range(200):
        controller = controller.update(kl, 512)
    assert 0 < float(controller.value) <= 1e8
    assert float(controller.update(6.6, 512).value) > 0


def test_the_fixed_kl_coefficient_does_not_change():
    assert rl.FixedKL(0.1).update(1e9, 64) == rl.FixedKL(0.1)


@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f])
def test_the_adaptive_penalty_doubles_and_halves(wrap):
    """With the target 0.01, β doubles above a KL of 0.015 and for NaN, and halves below 0.00667."""
    controller = rl.AdaptivePenalty(3.0, 0.01)
    update = wrap(controller.update)
    for kl, value in [(0.0151, 6), (0.0149, 3), (0.01, 3), (0.0067, 3), (0.0066, 1.5), (0.0, 1.5), (np.nan, 6)]:
        assert float(update(kl).value) == pytest.approx(value)


def test_the_adaptive_penalty_rises_again_after_many_decreases():
    controller = rl.AdaptivePenalty(1.0, 0.01)
    for _ in range(300):
        controller = controller.update(0.0)
    assert float(controller.update(1.0).value) > float(controller.value) > 0
