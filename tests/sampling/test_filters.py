"""Top-k and top-p keep the same tokens as sorting does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_rlhf.sampling.filters import keep_top_k, keep_top_p


def nucleus(logits, p):
    """The fewest most probable tokens of one row whose mass reaches p, by sorting in float64."""
    probabilities = np.exp(logits.astype(np.float64) - logits.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    count = int(np.searchsorted(np.cumsum(probabilities[order]), p)) + 1
    kept = np.zeros(len(logits), bool)
    kept[order[:count]] = True
    return kept


def rows(vocab=1000, count=32, spread=4.0):
    logits = np.random.RandomState(0).randn(count, vocab).astype(np.float32) * spread
    logits[1] += 1e4  # all positive
    logits[2] -= 1e4  # all negative
    logits[3, 5:] = -np.inf
    logits[4, ::2] = 0.0
    logits[4, 1::2] = -5.0
    return logits


@pytest.mark.parametrize("k", [1, 2, 7, 999, 1000])
def test_top_k_keeps_what_sorting_keeps(k):
    logits = rows()
    threshold = np.sort(logits, axis=1)[:, -k][:, None]
    np.testing.assert_array_equal(jax.jit(keep_top_k, static_argnums=1)(jnp.asarray(logits), k), logits >= threshold)


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_what_sorting_keeps(p):
    logits = rows()[5:]  # without ties
    kept = np.asarray(jax.jit(keep_top_p, static_argnums=1)(jnp.asarray(logits), p))
    wanted = np.stack([nucleus(row, p) for row in logits])
    assert kept.any(axis=1).all()
    # Float32 sums may decide differently about a token at the border: at most one per row, and two in all rows.
    assert np.abs(kept.sum(axis=1) - wanted.sum(axis=1)).max() <= 1
    assert (kept != wanted).sum() <= 2
    # The kept mass reaches p, and it would not without the least probable kept token.
    probabilities = np.asarray(jax.nn.softmax(logits, axis=1), np.float64)
    mass = np.where(kept, probabilities, 0).sum(axis=1)
    least = np.where(kept, probabilities, np.inf).min(axis=1)
    assert (mass >= p - 1e-6).all()
    assert (mass - least < p + 1e-6).all()


def test_top_k_keeps_ties_and_top_p_drops_minus_infinity():
    logits = rows()
    kept = np.asarray(keep_top_k(jnp.asarray(logits), 3))
    assert kept[4].sum() == 500  # ties with the third are kept
    kept = np.asarray(keep_top_p(jnp.asarray(logits), 0.9999))
    assert not kept[3, 5:].any()
    assert kept[3].any()
