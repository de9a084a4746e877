"""Draws from logits: their distribution, log-probs, kept mass and margin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jax_rlhf.sampling.draw import draw_tokens

SAMPLES = 50_000
P_VALUE = 1e-4  # probability of a false alarm; the keys are fixed


def keys(count, seed=0):
    return jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(jnp.arange(count))


def probabilities(logits, top_k=0, top_p=1.0):
    """(probabilities after the filters, kept mass) of one row, by sorting in float64."""
    full = np.exp(logits.astype(np.float64) - logits.max())
    full /= full.sum()
    order = np.argsort(-full, kind="stable")
    kept = np.zeros(len(full), bool)
    kept[order[: top_k or len(full)]] = True
    inside = np.where(kept, full, 0) / full[kept].sum()
    kept[order[np.searchsorted(np.cumsum(inside[order]), top_p) + 1 :]] = False
    return np.where(kept, full, 0) / full[kept].sum(), full[kept].sum()


def chi_square(tokens, expected):
    counts = np.bincount(tokens, minlength=len(expected))
    assert counts[expected == 0].sum() == 0
    return stats.chisquare(counts[expected > 0], expected[expected > 0] * len(tokens)).pvalue


def drawn(logits, seed=0, **filters):
    many = jnp.broadcast_to(jnp.asarray(logits), (SAMPLES, len(logits)))
    return jax.jit(lambda x, k: draw_tokens(x, k, **filters))(many, keys(SAMPLES, seed))


@pytest.mark.parametrize("vocab", [1, 2, 7, 64, 301])
def test_draws_follow_the_softmax(vocab):
    logits = np.random.RandomState(vocab).randn(vocab).astype(np.float32) * 1.5
    draw, (expected, _) = drawn(logits), probabilities(logits)
    if vocab > 1:
        assert chi_square(np.asarray(draw.tokens), expected) > P_VALUE
        # The test would detect a temperature that is 10 % higher.
        hotter, _ = probabilities(logits / 1.1)
        assert chi_square(np.asarray(draw.tokens), hotter) < P_VALUE
    np.testing.assert_allclose(draw.logprobs, np.log(expected)[draw.tokens], atol=2e-6)
    np.testing.assert_array_equal(draw.kept_mass, 1)


@pytest.mark.parametrize(
    "filters", [{"top_k": 2}, {"top_k": 3}, {"top_p": 0.8}, {"top_k": 20, "top_p": 0.7}, {"top_k": 500}]
)
def test_filters_change_the_draws_but_not_the_log_probs(filters):
    logits = np.random.RandomState(3).randn(40).astype(np.float32) * 2
    draw = drawn(logits, **filters)
    (expected, kept_mass), (full, _) = probabilities(logits, **filters), probabilities(logits)
    assert chi_square(np.asarray(draw.tokens), expected) > P_VALUE
    np.testing.assert_allclose(draw.logprobs, np.log(full)[draw.tokens], atol=2e-6)
    np.testing.assert_allclose(draw.kept_mass, kept_mass, atol=1e-6)


def test_greedy_takes_the_first_of_equal_maxima():
    logits = jnp.array([[0.0, 2.0, 1.0, 2.0], [3.0, 2.0, 1.0, 0.0]])
    draw = draw_tokens(logits, keys(2), top_k=1)
    np.testing.assert_array_equal(draw.tokens, [1, 0])
    np.testing.assert_array_equal(draw.margin, [0, 1])


def test_banned_ids_are_not_drawn_while_the_ban_is_on():
    logits = np.array([5.0, 0.0, 0.0, 0.0], np.float32)
    assert (drawn(logits, banned=(0,), ban=jnp.bool_(True)).tokens != 0).all()
    assert (drawn(logits, banned=(0,), ban=jnp.bool_(True), top_k=2).tokens != 0).all()
    assert (drawn(logits, banned=(0,), ban=jnp.bool_(True), top_k=1).tokens != 0).all()
    assert (drawn(logits, banned=(0,), ban=jnp.bool_(False)).tokens == 0).mean() > 0.9


@pytest.mark.parametrize("lead", [10.0, 86.0, 200.0])
@pytest.mark.parametrize("filters", [{}, {"top_k": 30}, {"top_p": 0.9}])
def test_draws_of_allowed_ids_are_right_however_likely_the_banned_id_is(lead, filters):
    """An EOS whose logit leads by 8.8 leads by 88 at temperature 0.1; there float32 exp(logit − max) underflows."""
    logits = np.random.RandomState(3).randn(40).astype(np.float32) * 1.5
    logits[7] = logits.max() + lead
    draw = drawn(logits, banned=(7,), ban=jnp.bool_(True), **filters)
    expected, kept_mass = probabilities(np.delete(logits, 7), **filters)
    assert chi_square(np.asarray(draw.tokens), np.insert(expected, 7, 0)) > P_VALUE
    full = logits.astype(np.float64) - np.logaddexp.reduce(logits.astype(np.float64))
    np.testing.assert_allclose(draw.logprobs, full[draw.tokens], rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(draw.kept_mass, kept_mass * -np.expm1(full[7]), rtol=1e-4, atol=1e-9)


def test_noise_changes_a_draw_only_where_the_margin_is_small():
    random = np.random.RandomState(0)
    logits = random.randn(4096, 200).astype(np.float32)
    noise = random.uniform(-3e-3, 3e-3, logits.shape).astype(np.float32)
    first, second = draw_tokens(jnp.asarray(logits), keys(4096)), draw_tokens(jnp.asarray(logits + noise), keys(4096))
    turned = np.asarray(first.tokens != second.tokens)
    assert 0 < turned.sum() < 40  # the noise is large enough to change some draws
    assert (np.asarray(first.margin)[turned] <= 6.1e-3).all()


def test_rows_are_independent():
    """Joint counts of neighbouring rows follow the product of the marginals. Equal keys would be detected."""
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    expected, _ = probabilities(logits)
    joint = np.outer(expected, expected).reshape(-1)
    tokens = np.asarray(drawn(logits).tokens)
    assert chi_square(tokens[:-1:2] * 4 + tokens[1::2], joint) > P_VALUE
    assert chi_square(tokens * 4 + tokens, joint) < P_VALUE
