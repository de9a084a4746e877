"""bfloat16 models compute sensitive operations in float32; float32 models ask for full precision in products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_rlhf.models import Decoder, init_params
from jax_rlhf.models.attention import attend
from jax_rlhf.models.layers import Norm, softcap
from jax_rlhf.models.rotary import Rotary, rotary_angles, rotate
from tests.models.test_decoder import MASK, TOKENS, tiny_config
from tests.programs import equations

ROTARY = Rotary(dim=8, theta=10_000.0)
FORMS = [
    {"rotary": ROTARY, "head_dim": 8, "qk_norm": True, "tie_embeddings": True},
    {"norm_kind": "layer", "attention_softcap": 5.0, "logit_softcap": 9.0, "gated_mlp": False, "activation": "relu"},
]


def dtypes(function, *arguments):
    """(name, dtypes of operands, dtype of result, shape of result) of each operation."""
    return [
        (
            equation.primitive.name,
            {str(variable.aval.dtype) for variable in equation.invars},
            str(equation.outvars[0].aval.dtype),
            equation.outvars[0].aval.shape,
        )
        for equation in equations(jax.make_jaxpr(function)(*arguments).jaxpr)
    ]


@pytest.mark.parametrize("head", ["lm", "scalar"])
@pytest.mark.parametrize("changes", FORMS, ids=["rms", "layer"])
def test_a_bfloat16_model_computes_sensitive_operations_in_float32(changes, head):
    config = tiny_config(dtype="bfloat16", **changes)
    model = Decoder(config, head=head)
    params = init_params(model, jax.random.key(0))
    found = dtypes(lambda p: model.apply({"params": p}, TOKENS, mask=MASK), params)
    exact = {"exp", "rsqrt", "cos", "sin", "log", "reduce_sum", "tanh"}  # softmax, norms, rotations, caps
    assert {dtype for name, _, dtype, _ in found if name in exact} == {"float32"}
    products = [(operands, dtype, shape) for name, operands, dtype, shape in found if name == "dot_general"]
    length = TOKENS.shape[1]
    scores = [(operands, dtype) for operands, dtype, shape in products if len(shape) == 4 and shape[-1] == length]
    assert scores
    assert all(each == ({"bfloat16"}, "float32") for each in scores)
    last = products[-1]
    if head == "lm":
        assert (last[0], last[1], last[2][-1]) == ({"bfloat16"}, "float32", config.vocab_size)
    else:
        assert (last[0], last[1], last[2][-1]) == ({"float32"}, "float32", 1)
    inside = [dtype for _, dtype, shape in products[:-1] if not (len(shape) == 4 and shape[-1] == length)]
    assert set(inside) == {"bfloat16"}  # all other products are in bfloat16
    assert jax.eval_shape(lambda p: model.apply({"params": p}, TOKENS), params).dtype == jnp.float32


def bfloat16(random, *shape, scale=1.0):
    return jnp.asarray(scale * random.randn(*shape), jnp.bfloat16)


def exactly(x):
    return np.asarray(x.astype(jnp.float32), np.float64)


def test_logits_and_values_have_only_float32_rounding():
    """Rounding a logit of 30 to bfloat16 could change it by 0.1."""
    random = np.random.RandomState(0)
    config = tiny_config(dtype="bfloat16", hidden_size=64, num_heads=4, head_dim=16, tie_embeddings=True)
    hidden, table = bfloat16(random, 5, 64, scale=4.0), bfloat16(random, config.vocab_size, 64)
    params = {"embedding": {"table": table.astype(jnp.float32)}}
    logits = Decoder(config).apply({"params": params}, hidden, method="apply_head")
    np.testing.assert_allclose(logits, exactly(hidden) @ exactly(table).T, rtol=1e-5, atol=1e-4)
    kernel = jnp.asarray(random.randn(64, 1), jnp.float32)  # not representable in bfloat16
    values = Decoder(config, head="scalar").apply(
        {"params": {"scalar_head": {"kernel": kernel}}}, hidden, method="apply_head"
    )
    wanted = exactly(hidden) @ np.asarray(kernel, np.float64)[:, 0]
    np.testing.assert_allclose(values, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms_round_once(kind):
    """The result is the exact value, rounded once to bfloat16 (a relative error of at most 2⁻⁸)."""
    random = np.random.RandomState(1)
    x = bfloat16(random, 3, 512, scale=3.0) + jnp.bfloat16(8.0)
    config = tiny_config(dtype="bfloat16", norm_kind=kind, norm_epsilon=1e-6)
    scale, bias = 1 + 0.3 * random.randn(512), 0.2 * random.randn(512)
    params = {"scale": jnp.asarray(scale, jnp.float32)} | (
        {"bias": jnp.asarray(bias, jnp.float32)} if kind == "layer" else {}
    )
    y = exactly(x)
    y = y - y.mean(-1, keepdims=True) if kind == "layer" else y
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6) * scale + (bias if kind == "layer" else 0)
    ours = Norm(config).apply({"params": params}, x)
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(exactly(ours), y, rtol=2**-8 * 1.01, atol=1e-5)


def test_attention_scores_and_softmax_are_float32():
    """With scores of 30 in bfloat16, each weight would be off by up to 6 %. The weights themselves are rounded once."""
    random = np.random.RandomState(2)
    query, key = bfloat16(random, 1, 1, 2, 16, scale=2.0), bfloat16(random, 1, 2, 2000, 16, scale=2.0)
    value = jnp.ones((1, 2, 2000, 16), jnp.bfloat16).at[:, :, ::2].set(-1)
    mixed = attend(query, key, value, jnp.ones((1, 1, 2000), bool), scale=1.0)
    scores = np.einsum("bthd,bhsd->bhts", exactly(query), exactly(key))
    assert 20 < np.abs(scores).max() < 200
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    wanted = np.einsum("bhts,bhsd->bthd", weights / weights.sum(-1, keepdims=True), exactly(value))
    np.testing.assert_allclose(exactly(mixed), wanted, atol=2**-8)


def test_rotary_embeddings_are_exact_at_large_positions():
    """At position 100,000, a bfloat16 angle would be off by hundreds of radians. A rotated pair is rounded once."""
    positions = jnp.asarray([[0, 1, 777, 100_000]])
    cos, sin = rotary_angles(ROTARY, positions)
    frequency = (10_000.0 ** (-np.arange(0, 8, 2) / 8)).astype(np.float32).astype(np.float64)
    angles = np.float32(np.asarray(positions)[0, :, None] * frequency)
    np.testing.assert_allclose(cos[0, :, 0], np.cos(angles.astype(np.float64)), atol=1e-5)
    x = bfloat16(np.random.RandomState(3), 1, 4, 2, 8)
    first, second = np.split(exactly(x), 2, axis=-1)
    c, s = np.asarray(cos, np.float64), np.asarray(sin, np.float64)
    wanted = np.concatenate([first * c - second * s, second * c + first * s], axis=-1)
    np.testing.assert_allclose(exactly(rotate(x, cos, sin)), wanted, rtol=2**-8 * 1.01, atol=1e-6)


def test_soft_caps_are_computed_in_float32():
    np.testing.assert_allclose(softcap(jnp.float32(29.03), 30.0), 30 * np.tanh(29.03 / 30), rtol=1e-6)


@pytest.mark.parametrize(("dtype", "wanted"), [("float32", jax.lax.Precision.HIGHEST), ("bfloat16", None)])
def test_products_of_a_float32_model_ask_for_float32_precision(dtype, wanted):
    """Float32 products of forward and backward pass ask for HIGHEST, unless the user sets a precision."""
    model = Decoder(tiny_config(dtype=dtype))
    params = init_params(model, jax.random.key(0))

    def precisions():
        loss = lambda p: jnp.sum(model.apply({"params": p}, TOKENS, mask=MASK))  # noqa: E731
        traced = jax.make_jaxpr(jax.grad(loss))(params)
        found = [e.params["precision"] for e in equations(traced.jaxpr) if e.primitive.name == "dot_general"]
        return {precision[0] if isinstance(precision, tuple) else precision for precision in found}

    assert precisions() == {wanted}
    with jax.default_matmul_precision("tensorfloat32"):
        assert jax.lax.Precision.HIGHEST not in precisions()


def test_values_are_float32_in_a_bfloat16_critic():
    model = Decoder(tiny_config(dtype="bfloat16"), head="scalar")
    params = init_params(model, jax.random.key(0))
    traced = jax.make_jaxpr(lambda p: model.apply({"params": p}, TOKENS))(params)
    last = [e for e in equations(traced.jaxpr) if e.primitive.name == "dot_general"][-1]
    assert last.params["precision"] in (jax.lax.Precision.HIGHEST, (jax.lax.Precision.HIGHEST,) * 2)
