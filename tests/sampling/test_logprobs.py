"""The scorer equals a float64 softmax for every chunk size, and never stores the logits of all positions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_rlhf import token_logprobs
from jax_rlhf.models import Decoder, Rotary, abstract_params, init_params
from jax_rlhf.sampling import score_hidden
from jax_rlhf.sampling.logprobs import categorical
from tests.models.test_decoder import tiny_config


def tiny(**changes):
    model = Decoder(tiny_config(**{"num_layers": 2, **changes}))
    return model, jax.tree.map(lambda leaf: leaf * 3, init_params(model, jax.random.key(0)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def forward(model, method, params, tokens, mask):
    return model.apply({"params": params}, tokens, mask=mask, method=method)


def batch(rows=4, length=11, vocab=31):
    random = np.random.RandomState(0)
    mask = np.ones((rows, length), bool)
    mask[1, :4] = False
    mask[2, -3:] = False
    mask[3, :5] = mask[3, -2:] = False
    return random.randint(0, vocab, (rows, length)), mask


def oracle(logits, tokens, temperature):
    """log softmax and entropy in float64: logits [B, T, V] of the states before tokens [B, T]."""
    z = logits.astype(np.float64) / temperature
    z = z - z.max(axis=-1, keepdims=True)
    logp = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    return np.take_along_axis(logp, tokens[..., None], axis=-1)[..., 0], -(np.exp(logp) * logp).sum(axis=-1)


@pytest.mark.parametrize(("temperature", "chunk"), [(1.0, None), (0.6, 1), (1.3, 3), (0.6, 10), (1.3, 99)])
@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True, "logit_softcap": 5.0, "padded_vocab_size": 40}])
def test_log_probs_and_entropy_equal_a_float64_softmax(changes, temperature, chunk):
    model, params = tiny(**changes)
    tokens, mask = batch()
    logits = np.asarray(forward(model, "__call__", params, tokens, mask))[:, :-1]
    wanted, wanted_entropy = oracle(logits, tokens[:, 1:], temperature)
    real = mask[:, 1:] & mask[:, :-1]
    logprobs = token_logprobs(model, params, tokens, mask, temperature=temperature, chunk=chunk)
    assert logprobs.dtype == jnp.float32
    np.testing.assert_allclose(logprobs, np.where(real, wanted, 0), atol=1e-5)
    hidden = forward(model, "hidden_states", params, tokens, mask)
    scored, entropy = score_hidden(
        model, params, hidden[:, :-1], jnp.asarray(tokens[:, 1:]), temperature=temperature, chunk=chunk
    )
    np.testing.assert_allclose(np.asarray(entropy)[real], wanted_entropy[real], atol=1e-5)
    np.testing.assert_allclose(np.asarray(scored)[real], wanted[real], atol=1e-5)


def test_ids_at_pads_have_no_effect_and_inner_pads_are_skipped():
    model, params = tiny()
    tokens, mask = batch()
    plain = token_logprobs(model, params, tokens, mask)
    for junk in (-100, 30, 10**6):
        np.testing.assert_array_equal(plain, token_logprobs(model, params, np.where(mask, tokens, junk), mask))
    # The same real tokens with a pad in between have the same log-probs.
    inner, inner_mask = np.insert(tokens[:1], 5, 0, axis=1), np.insert(mask[:1], 5, False, axis=1)
    moved = token_logprobs(model, params, inner, inner_mask)[0]
    np.testing.assert_allclose(np.delete(moved, 4), plain[0], atol=1e-5)
    assert moved[4] == 0


def test_scoring_twice_gives_equal_log_probs():
    model, params = tiny()
    tokens, mask = batch()
    np.testing.assert_array_equal(
        token_logprobs(model, params, tokens, mask), token_logprobs(model, params, tokens, mask)
    )


@pytest.mark.parametrize("chunk", [10, 3])
def test_gradients_equal_those_of_a_plain_softmax(chunk):
    """Gradients of log-probs and entropy through head, trunk and temperature, in one chunk and in several."""
    model, params = tiny(tie_embeddings=True, logit_softcap=5.0)
    tokens, mask = batch()
    random = np.random.RandomState(1)
    weights, entropy_weights = random.randn(2, 4, 10).astype(np.float32)

    def chunked(params):
        hidden = model.apply({"params": params}, tokens, mask=mask, method="hidden_states")[:, :-1]
        logprobs, entropy = score_hidden(
            model, params, hidden, jnp.asarray(tokens[:, 1:]), temperature=0.7, chunk=chunk
        )
        return jnp.sum(weights * logprobs + entropy_weights * entropy)

    def plain(params):
        logp = jax.nn.log_softmax(model.apply({"params": params}, tokens, mask=mask)[:, :-1] / 0.7)
        logprobs = jnp.take_along_axis(logp, jnp.asarray(tokens)[:, 1:, None], axis=-1)[..., 0]
        return jnp.sum(weights * logprobs - entropy_weights * jnp.sum(jnp.exp(logp) * logp, axis=-1))

    ours, wanted = jax.jit(jax.grad(chunked))(params), jax.jit(jax.grad(plain))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max() + 1e-6), ours, wanted)


def test_categorical_gradient_equals_finite_differences():
    with jax.enable_x64(True):
        logits = jnp.asarray(np.random.RandomState(0).randn(3, 7), jnp.float32)
        targets = jnp.array([0, 6, 3])

        def weighted(logits):
            logprobs, entropy = categorical(logits, targets)
            return jnp.sum(logprobs * jnp.array([1.0, -2.0, 0.5])) + 0.3 * jnp.sum(entropy)

        def plain(logits):
            logp = np.asarray(logits, np.float64)
            logp = logp - np.log(np.exp(logp).sum(axis=-1, keepdims=True))
            chosen = logp[np.arange(3), np.asarray(targets)]
            return (chosen * [1.0, -2.0, 0.5]).sum() - 0.3 * (np.exp(logp) * logp).sum()

        gradient = jax.grad(weighted)(logits)
        start = np.asarray(logits, np.float64)
        for place in np.ndindex(3, 7):
            step = np.zeros((3, 7))
            step[place] = 1e-5
            difference = (plain(start + step) - plain(start - step)) / 2e-5
            np.testing.assert_allclose(gradient[place], difference, atol=1e-5)


@pytest.mark.parametrize("backward", [False, True])
def test_float32_logits_of_all_positions_are_never_stored(backward):
    """B 8, T 512, V 50,000, tiny trunk: temporaries take less than a quarter of B·T·V·4 bytes."""
    rows, length, vocab = 8, 512, 50_000
    model = Decoder(
        tiny_config(
            vocab_size=vocab, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8,
            intermediate_size=16, rotary=Rotary(theta=100.0, dim=8), max_positions=length,
        )
    )  # fmt: skip
    params = abstract_params(model)
    tokens, mask = jax.ShapeDtypeStruct((rows, length), jnp.int32), jax.ShapeDtypeStruct((rows, length), bool)

    def total(params, tokens, mask):
        return jnp.sum(token_logprobs(model, params, tokens, mask))

    compiled = jax.jit(jax.grad(total) if backward else total).lower(params, tokens, mask).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < rows * length * vocab * 4 / 4
    # A plain log-softmax would not pass.
    if not backward:

        def plain(params, tokens, mask):
            logp = jax.nn.log_softmax(model.apply({"params": params}, tokens, mask=mask))
            return jnp.sum(jnp.take_along_axis(logp[:, :-1], tokens[:, 1:, None], axis=-1)), logp.max()

        naive = jax.jit(plain).lower(params, tokens, mask).compile()
        assert naive.memory_analysis().temp_size_in_bytes > rows * length * vocab * 4 / 4


def test_bfloat16_trunk_gives_float32_log_probs():
    model, params = tiny(dtype=jnp.bfloat16)
    exact, _ = tiny()
    tokens, mask = batch()
    logprobs = token_logprobs(model, params, tokens, mask)
    assert logprobs.dtype == jnp.float32
    np.testing.assert_allclose(logprobs, token_logprobs(exact, params, tokens, mask), atol=0.3)
