"""The custom matrix products equal `einsum` in values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_rlhf.models import Decoder, init_params, kernels_by_output, unstack_layers
from jax_rlhf.models.products import look_up_logits, project
from tests.models.test_decoder import MASK, TOKENS, tiny_config


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize(
    ("product", "plain", "x", "kernel"),
    [
        (lambda x, w: project(x, w, 1), "btd,dhk->bthk", (2, 5, 6), (6, 3, 4)),
        (lambda x, w: project(x, w, 2), "bthk,hkd->btd", (2, 5, 3, 4), (3, 4, 6)),
        (lambda x, w: project(x, w, 1), "bd,df->bf", (5, 6), (6, 7)),
        (look_up_logits, "btd,vd->btv", (2, 5, 6), (11, 6)),
        (look_up_logits, "bd,vd->bv", (5, 6), (11, 6)),
    ],
)
def test_values_and_gradients_equal_einsum(product, plain, x, kernel):
    x, kernel = normal(0, *x), normal(1, *kernel)
    wanted, pull_wanted = jax.vjp(lambda x, w: jnp.einsum(plain, x, w), x, kernel)
    y, pull = jax.jit(lambda x, w: jax.vjp(product, x, w))(x, kernel)
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)
    gradient = normal(2, *wanted.shape)
    for got, expected in zip(pull(gradient), pull_wanted(gradient), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "gated_mlp": False}])
def test_kernels_stored_by_output_give_the_same_logits(changes):
    model = Decoder(tiny_config(**changes))
    params = unstack_layers(init_params(model, jax.random.key(0)), 3)
    params = jax.tree.map(lambda leaf: leaf + 0.1 * normal(leaf.size, *leaf.shape), params)  # so that biases are not 0
    transposed = kernels_by_output(params)
    assert transposed["layers_0"]["attention"]["out"]["kernel_by_output"].shape == (24, 6, 10)
    assert transposed["layers_2"]["mlp"]["down"].keys() - {"bias"} == {"kernel_by_output"}
    unrolled = model.clone(scan_layers=False)
    logits = [
        np.asarray(unrolled.apply({"params": p}, TOKENS, mask=MASK))[np.asarray(MASK)] for p in (params, transposed)
    ]
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-5)
