"""Masked statistics depend neither on pads nor on the number of devices."""

from inspect import unwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_rlhf import rl
from tests.rl import oracle

RANDOM = np.random.RandomState(0)
X = RANDOM.randn(8, 5) * 3 + 2
MASK = np.arange(5) < np.array([5, 1, 3, 4, 2, 5, 1, 2])[:, None]


@pytest.mark.parametrize("scale", [1, 1e-4])  # with 1e-4, the variance is close to the ε under the root
@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f])
def test_whitening_equals_the_oracle(shift_mean, wrap, scale):
    with jax.enable_x64(True):
        ours = wrap(lambda x, m: rl.masked_whiten(x, m, shift_mean=shift_mean))(scale * X, MASK)
    np.testing.assert_allclose(ours, oracle.whiten(scale * X, MASK, shift_mean), atol=1e-12)


def test_the_variance_is_biased_and_of_real_elements_only():
    with jax.enable_x64(True):
        np.testing.assert_allclose(rl.masked_variance(X, MASK), np.var(X[MASK]), atol=1e-12)


def check_that_pads_change_nothing(whiten):
    x, mask = X.astype(np.float32), MASK
    wider = np.concatenate([x, np.full((8, 4), 77, np.float32)], axis=1)
    wider_mask = np.concatenate([mask, np.zeros((8, 4), bool)], axis=1)
    np.testing.assert_allclose(whiten(wider, wider_mask)[:, :5], whiten(x, mask), atol=1e-6)


def test_whitening_ignores_pads():
    check_that_pads_change_nothing(rl.masked_whiten)
    with pytest.raises(AssertionError):  # whitening over all slots does not
        check_that_pads_change_nothing(lambda x, mask: (x - x.mean()) / x.std() * mask)


def sharded(f, *arrays):
    rows = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    return jax.jit(f)(*[jax.device_put(a, rows) for a in arrays])


def check_that_devices_change_nothing(one, eight):
    x = X.astype(np.float32)
    np.testing.assert_allclose(eight(x, MASK), one(x, MASK), atol=1e-6)


@pytest.mark.parametrize("value", [51_234.56, 7.3e6 / 3])
@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f])
def test_whitening_equal_numbers_gives_zeros(value, wrap):
    """The rounding error of a large mean must not count as variance."""
    both = wrap(lambda x, mask: (rl.masked_whiten(x, mask), rl.masked_whiten(x, mask, shift_mean=False)))
    for count in range(1, 40):
        x = jnp.full((1, count), value, jnp.float32)
        whitened, kept = both(x, jnp.ones((1, count), bool))
        np.testing.assert_array_equal(whitened, np.zeros((1, count)))
        np.testing.assert_array_equal(kept, x)


def test_whitening_uses_the_statistics_of_all_devices():
    check_that_devices_change_nothing(rl.masked_whiten, lambda x, m: sharded(rl.masked_whiten, x, m))
    per_device = jax.vmap(lambda x, m: rl.masked_whiten(x[None], m[None])[0])  # one row per device, each whitened alone
    with pytest.raises(AssertionError):
        check_that_devices_change_nothing(rl.masked_whiten, per_device)


def test_an_empty_mask_gives_zeros_instead_of_nan():
    x, mask = jnp.array([[1.0, jnp.nan]]), jnp.zeros((1, 2), bool)
    assert float(rl.masked_mean(x, mask)) == 0
    assert float(rl.masked_variance(x, mask)) == 0
    assert not np.asarray(rl.masked_whiten(x, mask)).any()


def test_nan_at_a_masked_element_reaches_neither_value_nor_gradient():
    mask = jnp.array([True, False])
    value, gradient = jax.value_and_grad(lambda x: rl.masked_mean(x, mask))(jnp.array([3.0, jnp.nan]))
    assert float(value) == 3
    np.testing.assert_array_equal(gradient, [1, 0])


@pytest.mark.parametrize(
    ("x", "mask"), [(np.ones(3, int), np.ones(3, bool)), (np.ones(3), np.ones(3)), (np.ones(3), np.ones(2, bool))]
)
def test_integers_float_masks_and_unequal_shapes_are_errors(x, mask):
    with pytest.raises(AssertionError):
        unwrap(rl.masked_sum)(x, mask)
