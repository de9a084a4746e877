"""Which tokens attend to which, as explicit tables; and attention compared with NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from jax_rlhf.models.attention import NOT_REAL, AttentionContext, attend, token_order, visible


def context(mask):
    query, key = token_order(jnp.asarray(mask, bool))
    return AttentionContext(query, key, None, None)


def test_order_counts_the_real_tokens_before_a_token():
    query, key = token_order(jnp.array([[0, 1, 1, 0, 1]], bool))
    assert query.tolist() == [[-1, 0, 1, 1, 2]]
    assert key.tolist() == [[NOT_REAL, 0, 1, NOT_REAL, 2]]
    query, _ = token_order(jnp.array([[1, 1]], bool), start=jnp.array([5]))
    assert query.tolist() == [[5, 6]]


def test_a_token_attends_to_real_tokens_up_to_itself():
    seen = visible(context([[0, 1, 1, 0, 1]]), None)[0].astype(int)
    assert seen.tolist() == [
        [0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 1, 1, 0, 1],
    ]


def test_pads_do_not_count_in_a_sliding_window():
    seen = visible(context([[0, 1, 1, 0, 1]]), 2)[0].astype(int)
    assert seen[4].tolist() == [0, 0, 1, 0, 1]
    assert visible(context([[1, 1, 1]]), 1)[0].astype(int).tolist() == np.eye(3, dtype=int).tolist()


@pytest.mark.parametrize("cap", [None, 1.5])
def test_attention_equals_numpy(cap):
    draw = np.random.RandomState(3)
    query = draw.standard_normal((2, 4, 6, 5))
    key, value = draw.standard_normal((2, 2, 2, 7, 5))
    allowed = draw.rand(2, 4, 7) < 0.6
    allowed[0, 1] = False  # a query that attends to nothing
    ours = attend(*(jnp.asarray(x, jnp.float32) for x in (query, key, value)), jnp.asarray(allowed), scale=0.3, cap=cap)
    assert np.isfinite(ours).all()
    for b, t, h in np.ndindex(2, 4, 6):
        if not allowed[b, t].any():
            continue
        scores = key[b, h // 3] @ query[b, t, h] * 0.3
        scores = scores if cap is None else cap * np.tanh(scores / cap)
        weights = np.exp(scores) * allowed[b, t]
        np.testing.assert_allclose(ours[b, t, h], weights @ value[b, h // 3] / weights.sum(), atol=1e-5)
