"""Losses equal plain loops, gradients equal finite differences, and microbatches do not change the gradient."""

from inspect import unwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_rlhf import rl
from tests.rl import oracle

RANDOM = np.random.RandomState(0)
LOG_RATIO, ADVANTAGES = RANDOM.randn(4, 6) * 0.5, RANDOM.randn(4, 6)
OLD, NEW, RETURNS = RANDOM.randn(4, 6), RANDOM.randn(4, 6), RANDOM.randn(4, 6)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize(("low", "high", "dual"), [(0.2, 0.2, None), (0.1, 0.4, None), (0.2, 0.2, 1.5)])
@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f])
def test_clipped_surrogate_equals_the_oracle(low, high, dual, wrap):
    ours = wrap(lambda x, a: rl.clipped_surrogate(x, a, clip_low=low, clip_high=high, dual_clip=dual))
    wanted = np.vectorize(lambda x, a: oracle.clipped_surrogate(x, a, low, high, dual))(LOG_RATIO, ADVANTAGES)
    np.testing.assert_allclose(ours(LOG_RATIO, ADVANTAGES), wanted, atol=1e-12)


def test_the_ratio_is_limited_to_exp_20():
    for surrogate in (rl.clipped_surrogate, lambda x, a: rl.penalized_surrogate(x, a, jnp.zeros_like(x), beta=1.0)):
        loss = surrogate(jnp.array([19.0, 20.0, 21.0, 800.0]), -jnp.ones(4))
        np.testing.assert_allclose(loss, np.exp([19.0, 20.0, 20.0, 20.0]), rtol=1e-12)


def check_value_loss(loss):
    wanted = np.vectorize(lambda v, o, r: oracle.clipped_value_loss(v, o, r, 0.2))(NEW, OLD, RETURNS)
    np.testing.assert_allclose(loss(NEW, OLD, RETURNS), wanted, atol=1e-12)


def test_value_loss_is_the_larger_of_plain_and_clipped_around_old_values():
    check_value_loss(rl.clipped_value_loss)
    clipped = lambda v, o: o + np.clip(v - o, -0.2, 0.2)  # noqa: E731
    with pytest.raises(AssertionError):  # the smaller of the two
        check_value_loss(lambda v, o, r: 0.5 * np.minimum((v - r) ** 2, (clipped(v, o) - r) ** 2))
    with pytest.raises(AssertionError):  # clipped around the new values
        check_value_loss(lambda v, o, r: rl.clipped_value_loss(v, v, r))


def test_penalized_surrogate_follows_its_formula():
    kl = rl.kl_estimate(jnp.zeros_like(LOG_RATIO), jnp.asarray(LOG_RATIO), "k3")
    ours = rl.penalized_surrogate(LOG_RATIO, ADVANTAGES, kl, beta=0.7)
    wanted = -ADVANTAGES * np.exp(LOG_RATIO) + 0.7 * (np.exp(LOG_RATIO) - 1 - LOG_RATIO)
    np.testing.assert_allclose(ours, wanted, atol=1e-12)


def test_dual_clip_caps_the_loss_only_where_the_advantage_is_negative():
    log_ratio, advantages = np.log([10.0, 10.0, 1.5]), np.array([-2.0, 2.0, -2.0])
    np.testing.assert_allclose(rl.clipped_surrogate(log_ratio, advantages, dual_clip=3.0), [6, -2.4, 3])
    np.testing.assert_allclose(rl.clipped_surrogate(log_ratio, advantages), [20, -2.4, 3])


@pytest.mark.parametrize("log_ratio", [1e4, -1e4])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_extreme_log_ratios_give_finite_losses_and_gradients(log_ratio, advantage):
    loss = lambda x: rl.clipped_surrogate(x, jnp.array([advantage]))[0]  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(jnp.array([log_ratio]))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_bradley_terry_loss_follows_its_formula():
    chosen, rejected, margin = np.array([1.0, 0.0, 900.0]), np.array([0.0, 2.0, -900.0]), np.array([0.5, 0.0, 1.0])
    np.testing.assert_allclose(rl.bradley_terry_loss(chosen, rejected), np.log1p(np.exp([-1.0, 2, -1800])))
    np.testing.assert_allclose(
        rl.bradley_terry_loss(chosen, rejected, margin=margin), np.log1p(np.exp([-0.5, 2, -1799]))
    )


def test_token_ranking_runs_from_the_first_difference_to_the_longer_end():
    same, longer = [1, 2, 3, 0, 0, 0], [1, 2, 0, 5, 0, 0]  # the longer answer continues with the pad id
    chosen_ids = np.array([[5, 6, 7, 8, 0, 0], [5, 6, 0, 0, 0, 0], [5, 0, 6, 6, 0, 0], same, longer])
    rejected_ids = np.array([[5, 6, 9, 0, 0, 0], [5, 6, 4, 4, 4, 0], [5, 0, 6, 7, 7, 7], same, [1, 2, 0, 0, 0, 0]])
    lengths = [(4, 3), (2, 5), (4, 6), (3, 3), (4, 2)]  # the id 0 within the third pair is a real token
    chosen_mask, rejected_mask = (np.arange(6) < np.array([pair[i] for pair in lengths])[:, None] for i in (0, 1))
    chosen, rejected = RANDOM.randn(5, 6), RANDOM.randn(5, 6)
    ours = jax.jit(rl.token_ranking_loss)(chosen, rejected, chosen_ids, rejected_ids, chosen_mask, rejected_mask)
    rows = zip(chosen, rejected, chosen_ids, rejected_ids, *np.transpose(lengths), strict=True)
    np.testing.assert_allclose(ours, [oracle.token_ranking(*row) for row in rows], atol=1e-12)


GRADIENT_CASES = {
    "clip": lambda x: rl.clipped_surrogate(x, jnp.asarray(ADVANTAGES)),
    "dual clip": lambda x: rl.clipped_surrogate(x, jnp.asarray(ADVANTAGES), dual_clip=1.3),
    "penalty": lambda x: rl.penalized_surrogate(
        x, jnp.asarray(ADVANTAGES), rl.kl_estimate(jnp.zeros_like(x), x, "k3"), beta=0.7
    ),
    "value": lambda x: rl.clipped_value_loss(x, jnp.asarray(OLD), jnp.asarray(RETURNS)),
    "bradley-terry": lambda x: rl.bradley_terry_loss(x[:, 0], x[:, 1]),
}


@pytest.mark.parametrize("name", GRADIENT_CASES)
def test_gradients_equal_finite_differences(name):
    """No input lies within 1e-6 of a kink of its loss."""
    f = jax.jit(lambda x: jnp.sum(jnp.sin(jnp.arange(4.0) + 1)[: len(x)] @ GRADIENT_CASES[name](x).reshape(4, -1)))
    gradient = jax.grad(f)(jnp.asarray(LOG_RATIO))
    for index in np.ndindex(LOG_RATIO.shape):
        step = np.zeros_like(LOG_RATIO)
        step[index] = 1e-6
        slope = (f(LOG_RATIO + step) - f(LOG_RATIO - step)) / 2e-6
        assert float(gradient[index]) == pytest.approx(float(slope), abs=1e-7)


WEIGHTS = jnp.asarray(RANDOM.randn(3))
FEATURES = RANDOM.randn(8, 5, 3)
LENGTHS = np.array([5, 1, 3, 0, 2, 5, 1, 4])
TOKENS = np.arange(5) < LENGTHS[:, None]
TARGETS = RANDOM.randn(8, 5)


def loss_sum(weights, features, mask, targets):
    return rl.masked_sum(rl.clipped_value_loss(features @ weights, targets * 0, targets, clip_range=9.0), mask)


def check_that_microbatches_add_up(reduce):
    whole = jax.grad(lambda w: loss_sum(w, FEATURES, TOKENS, TARGETS) / TOKENS.sum())(WEIGHTS)
    for size in (1, 2, 4):
        parts = [slice(start, start + size) for start in range(0, 8, size)]
        np.testing.assert_allclose(reduce(parts), whole, atol=1e-12)


def test_microbatches_give_the_gradient_of_the_whole_batch():
    def by_global_count(parts):
        return sum(
            jax.grad(lambda w, p=p: loss_sum(w, FEATURES[p], TOKENS[p], TARGETS[p]) / TOKENS.sum())(WEIGHTS)
            for p in parts
        )

    def mean_of_means(parts):
        return sum(
            jax.grad(
                lambda w, p=p: loss_sum(w, FEATURES[p], TOKENS[p], TARGETS[p]) / max(TOKENS[p].sum(), 1) / len(parts)
            )(WEIGHTS)
            for p in parts
        )

    check_that_microbatches_add_up(by_global_count)
    with pytest.raises(AssertionError):
        check_that_microbatches_add_up(mean_of_means)


def test_eight_devices_give_the_gradient_of_one():
    rows = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    gradient = jax.grad(lambda w, *x: loss_sum(w, *x) / TOKENS.sum())
    eight = jax.jit(gradient)(WEIGHTS, *[jax.device_put(x, rows) for x in (FEATURES, TOKENS, TARGETS)])
    np.testing.assert_allclose(eight, gradient(WEIGHTS, FEATURES, TOKENS, TARGETS), atol=1e-12)


def test_wrong_dtypes_shapes_and_settings_are_errors():
    with pytest.raises(AssertionError):
        unwrap(rl.clipped_surrogate)(LOG_RATIO, ADVANTAGES.astype(int))
    with pytest.raises(AssertionError):
        unwrap(rl.clipped_value_loss)(NEW, OLD, RETURNS[:, :1])
    with pytest.raises(AssertionError):
        unwrap(rl.bradley_terry_loss)(np.array([1]), np.array([2]))
    with pytest.raises(ValueError, match="dual_clip=1"):
        rl.clipped_surrogate(LOG_RATIO, ADVANTAGES, dual_clip=1)
