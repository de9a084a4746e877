"""Rotary embeddings compared with their definition in float64."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jax_rlhf.models.rotary import Rotary, frequencies, rotary_angles, rotate


def test_rotation_is_a_complex_product():
    rotary = Rotary(theta=100.0, dim=6)
    x = np.random.RandomState(0).standard_normal((2, 5, 3, 10))
    positions = np.array([[0, 1, 2, 3, 4], [7, 7, 30, 2, 0]])
    ours = rotate(jnp.asarray(x, jnp.float32), *rotary_angles(rotary, jnp.asarray(positions)))
    pairs = x[..., :3] + 1j * x[..., 3:6]
    turned = pairs * np.exp(1j * positions[:, :, None, None] * 100.0 ** (-np.arange(3) / 3))
    expected = np.concatenate([turned.real, turned.imag, x[..., 6:]], axis=-1)
    np.testing.assert_allclose(ours, expected, atol=2e-6)


def test_query_key_products_depend_only_on_the_distance():
    rotary = Rotary(theta=50.0, dim=8)
    query, key = np.random.RandomState(1).standard_normal((2, 1, 1, 1, 8)).astype(np.float32)

    def product(i, j):
        turned = [rotate(jnp.asarray(x), *rotary_angles(rotary, jnp.array([[at]]))) for x, at in ((query, i), (key, j))]
        return float((turned[0] * turned[1]).sum())

    assert product(9, 4) == pytest.approx(product(105, 100), abs=1e-4)
    assert product(9, 4) != pytest.approx(product(9, 6), abs=1e-2)


def test_linear_scaling_stretches_every_wavelength():
    plain = frequencies(Rotary(theta=1e4, dim=8))
    np.testing.assert_allclose(frequencies(Rotary(theta=1e4, dim=8, kind="linear", factor=4.0)), plain / 4)


def test_llama3_keeps_short_wavelengths_and_stretches_long_ones():
    rotary = Rotary(theta=5e5, dim=128, kind="llama3", factor=8.0, original_max_positions=8192)
    plain, scaled = frequencies(Rotary(theta=5e5, dim=128)), frequencies(rotary)
    wavelength = 2 * math.pi / plain
    assert (scaled[wavelength < 8192 / 4] == plain[wavelength < 8192 / 4]).all()
    np.testing.assert_allclose(scaled[wavelength > 8192], plain[wavelength > 8192] / 8)
    between = (wavelength >= 8192 / 4) & (wavelength <= 8192)
    assert between.any()
    assert (np.diff(plain / scaled) >= -1e-12).all()  # the stretch grows with the wavelength


def test_longrope_factors_are_chosen_per_row():
    rotary = Rotary(
        theta=100.0, dim=4, kind="longrope", original_max_positions=4, short_factor=(1.0, 1.0), long_factor=(2.0, 8.0)
    )
    _, sin = rotary_angles(rotary, jnp.array([[0, 1, 3], [0, 1, 4]]))
    np.testing.assert_allclose(sin[0, 1, 0], np.sin([1.0, 0.1]), rtol=1e-6)
    np.testing.assert_allclose(sin[1, 1, 0], np.sin([1 / 2, 0.1 / 8]), rtol=1e-6)


def test_odd_dimensions_round_up_to_a_pair():
    assert frequencies(Rotary(theta=10.0, dim=3)).shape == (2,)
