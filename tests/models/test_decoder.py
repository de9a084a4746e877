"""The decoder: scanned and unrolled layers, remat, gradients, program size by depth, and checks of inputs."""

import time
from inspect import unwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_rlhf.models import (
    Decoder,
    DecoderConfig,
    Rotary,
    abstract_params,
    create_cache,
    init_params,
    logical_axes,
    unstack_layers,
)
from jax_rlhf.models.decoder import _checked
from jax_rlhf.parallel import LOGICAL_TO_MESH


def tiny_config(**changes):
    fields = {
        "vocab_size": 31,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_layers": 3,
        "num_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 10,
        "max_positions": 64,
        "rotary": Rotary(theta=100.0, dim=10),
        "attention_scale": 10**-0.5,
    }
    return DecoderConfig(**{**fields, **changes})


def llama3_8b():
    return DecoderConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_positions=8192,
        rotary=Rotary(theta=5e5, dim=128),
        attention_scale=128**-0.5,
        dtype=jnp.bfloat16,
    )


TOKENS = jnp.asarray(np.random.RandomState(0).randint(0, 31, (2, 9)))
MASK = jnp.array([[1] * 9, [0, 0, 1, 1, 1, 1, 1, 1, 0]], bool)


def loss(model, params):
    logits = model.apply({"params": params}, TOKENS, mask=MASK)
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), TOKENS[:, 1:, None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(MASK[:, :-1] & MASK[:, 1:], logprobs, 0.0))


def test_remat_policies_and_unrolled_layers_have_the_same_gradients():
    windows = {"sliding_window": 3, "sliding_layers": (True, False, True)}
    model = Decoder(tiny_config(remat="none", **windows))
    params = init_params(model, jax.random.key(0))
    gradient = jax.jit(jax.grad(lambda p: loss(model, p)))(params)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradient))
    for remat in ("full", "dots"):
        other = Decoder(tiny_config(remat=remat, **windows))
        same = jax.jit(jax.grad(lambda p, other=other: loss(other, p)))(params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient, same)
    unrolled = model.clone(scan_layers=False)
    same = jax.jit(jax.grad(lambda p: loss(unrolled, unstack_layers(p, 3))))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient, same)


def test_gradient_equals_finite_differences():
    model = Decoder(tiny_config(num_layers=1))
    params = init_params(model, jax.random.key(1))
    direction = jax.tree.map(lambda leaf: jnp.sign(leaf) / leaf.size**0.5, params)
    slope = sum(
        float(jnp.vdot(g, d))
        for g, d in zip(
            jax.tree.leaves(jax.grad(lambda p: loss(model, p))(params)), jax.tree.leaves(direction), strict=True
        )
    )

    def moved(step):
        return float(loss(model, jax.tree.map(lambda p, d: p + step * d, params, direction)))

    assert slope == pytest.approx((moved(1e-2) - moved(-1e-2)) / 2e-2, rel=1e-2)


def test_a_row_of_pads_gives_finite_logits_and_does_not_affect_others():
    model = Decoder(tiny_config())
    params = init_params(model, jax.random.key(0))
    empty = jnp.zeros_like(MASK).at[0].set(True)
    logits = model.apply({"params": params}, TOKENS, mask=empty)
    assert jnp.isfinite(logits).all()
    alone = model.apply({"params": params}, TOKENS[:1], mask=empty[:1])
    np.testing.assert_allclose(logits[0], alone[0], atol=1e-5)


def test_an_id_outside_the_vocabulary_turns_its_row_to_nan():
    model = Decoder(tiny_config())
    params = init_params(model, jax.random.key(0))
    for wrong in (31, -1):
        logits = model.apply({"params": params}, TOKENS.at[0, 4].set(wrong))
        assert jnp.isnan(logits[0]).all()
        assert jnp.isfinite(logits[1]).all()


def test_explicit_positions_are_used():
    model = Decoder(tiny_config())
    params = init_params(model, jax.random.key(2))
    default = model.apply({"params": params}, TOKENS)
    counted = model.apply({"params": params}, TOKENS, jnp.broadcast_to(jnp.arange(9), (2, 9)))
    np.testing.assert_array_equal(counted, default)
    shifted = model.apply({"params": params}, TOKENS, jnp.arange(9) + jnp.array([[0], [20]]))
    np.testing.assert_allclose(shifted, default, atol=1e-4)  # rotary embeddings depend only on distances
    spread = model.apply({"params": params}, TOKENS, jnp.arange(9) * jnp.array([[1], [3]]))
    assert jnp.abs(spread[1] - default[1]).max() > 1e-3


def test_logits_leave_out_the_padding_of_the_vocabulary():
    config = tiny_config(padded_vocab_size=40)
    model = Decoder(config)
    params = init_params(model, jax.random.key(0))
    assert params["embedding"]["table"].shape == (40, 24)
    assert model.apply({"params": params}, TOKENS).shape == (2, 9, 31)


def test_inputs_of_wrong_dtype_shape_or_span_are_errors():
    model = Decoder(tiny_config())
    params = init_params(model, jax.random.key(0))
    check = unwrap(_checked)
    with pytest.raises(AssertionError, match="type"):
        check(TOKENS, None, MASK.astype(int))  # a mask is boolean
    with pytest.raises(AssertionError, match="shape"):
        check(TOKENS, None, MASK[:, 1:])
    with pytest.raises(AssertionError, match="rank"):
        check(TOKENS[0], None, None)
    cache = create_cache(model.config, 2, 8, scan_layers=True)
    with pytest.raises(ValueError, match="span=8 must lie between the 9 new tokens and the 8 slots"):
        model.apply({"params": params}, TOKENS, cache, method="extend")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 4}, "multiple of num_kv_heads"),
        ({"rotary": None}, "needs `rotary`"),
        ({"sliding_layers": (True,), "sliding_window": 2}, "1 entries for 3 layers"),
        ({"sliding_layers": (True, True, False)}, "sliding_window is None"),
        ({"padded_vocab_size": 30}, "below vocab_size=31"),
        ({"parallel_residual": True, "norm_placement": "both"}, "before"),
    ],
    ids=str,
)
def test_contradictory_configs_are_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


def test_every_parameter_has_known_logical_axes():
    kinds = [
        {},
        {"position_kind": "learned", "rotary": None, "embedding_size": 8, "norm_kind": "layer", "qk_norm": True},
        {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "norm_placement": "both"},
    ]
    for changes in kinds:
        for head in ("lm", "scalar"):
            model = Decoder(tiny_config(**changes), head=head)
            axes = jax.tree.leaves(logical_axes(model), is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec))
            shapes = jax.tree.leaves(abstract_params(model))
            assert [len(spec) for spec in axes] == [len(leaf.shape) for leaf in shapes]
            assert {name for spec in axes for name in spec if name} <= LOGICAL_TO_MESH.keys()


def test_a_model_of_8b_parameters_traces_and_lowers_in_seconds():
    """The program's size does not depend on the depth: 32 layers give as many lines as 2."""
    start = time.monotonic()
    model = Decoder(llama3_8b())
    params = abstract_params(model)
    assert 8.0e9 < sum(leaf.size for leaf in jax.tree.leaves(params)) < 8.1e9
    tokens = jax.ShapeDtypeStruct((1, 128), jnp.int32)

    def total(params, tokens):
        return model.apply({"params": params}, tokens).sum()

    text = jax.jit(jax.grad(total)).lower(params, tokens).as_text()
    assert time.monotonic() - start < 10
    shallow = Decoder(llama3_8b().replace(num_layers=2))

    def total_shallow(params, tokens):
        return shallow.apply({"params": params}, tokens).sum()

    other = jax.jit(jax.grad(total_shallow)).lower(abstract_params(shallow), tokens).as_text()
    assert len(text.splitlines()) == len(other.splitlines())
