"""Tests check the shapes and dtypes in annotations, in each package that `checked_types` names."""

import jax
import jax.numpy as jnp
import pytest
from jax import Array
from jaxtyping import Float, TypeCheckError, jaxtyped

from jax_rlhf import rl
from jax_rlhf.models.attention import token_order
from jax_rlhf.optim.optimizer import OptimizerConfig, optimizer_step
from jax_rlhf.ppo.metrics import policy_sums
from jax_rlhf.sampling.filters import keep_top_k
from tests.checked_types import CHECKED, check
from tests.test_imports import loaded_by

ONES, TRUE = jnp.ones((2, 3)), jnp.ones((2, 3), bool)

RIGHT = {
    rl.masked_sum: {"x": ONES, "mask": TRUE},
    keep_top_k: {"logits": ONES, "k": 1},
    token_order: {"mask": TRUE, "start": jnp.zeros(2, jnp.int32)},
    optimizer_step: {
        "config": OptimizerConfig(),
        "gradient": {},
        "state": (),
        "params": {},
        "take": jnp.bool_(True),
        "step": jnp.int32(0),
    },
    policy_sums: {
        "config": None,
        "batch": None,
        **dict.fromkeys(("policy_loss", "entropy", "log_ratio", "old_to_new"), ONES),
        "tokens": jnp.float32(6),
    },
}


@pytest.mark.parametrize(
    ("function", "name", "shape", "dtype"),
    [
        (rl.masked_sum, "mask", TRUE[:, 1:], TRUE.astype(int)),
        (keep_top_k, "logits", ONES[0], ONES.astype(jnp.bfloat16)),
        (token_order, "start", jnp.zeros(3, jnp.int32), jnp.zeros(2)),
        (optimizer_step, "take", jnp.ones(2, bool), jnp.float32(1)),
        (policy_sums, "log_ratio", ONES[:, 1:], ONES.astype(int)),
    ],
    ids=lambda value: getattr(value, "__module__", None),
)
def test_a_wrong_shape_and_a_wrong_dtype_are_refused(function, name, shape, dtype):
    for wrong in (shape, dtype):
        with pytest.raises(TypeCheckError, match=f"parameter '{name}'"):
            function(**RIGHT[function] | {name: wrong})
        with pytest.raises(TypeCheckError, match=f"parameter '{name}'"):  # tracers too
            jax.eval_shape(lambda wrong: function(**RIGHT[function] | {name: wrong}), wrong)


def test_every_checked_package_has_a_function_in_this_test():
    assert sorted(function.__module__.rpartition(".")[0] for function in RIGHT) == CHECKED
    for function in (rl.masked_sum, keep_top_k, token_order):
        function(**RIGHT[function])


def test_a_wrong_result_is_refused():
    @jaxtyped(typechecker=check)
    def turned(x: Float[Array, "B T"]) -> Float[Array, "B T"]:
        return x.T

    turned(ONES[:, :2])
    with pytest.raises(TypeCheckError, match="return value"):
        turned(ONES)


def test_dataclasses_accept_what_jax_puts_in_the_place_of_arrays():
    batch = rl.Batch(TRUE.astype(int), TRUE)
    for put in (lambda leaf: leaf.sharding, lambda _: None, lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)):
        assert isinstance(jax.tree.map(put, batch), rl.Batch)


def test_without_tests_no_type_checker_is_loaded():
    loaded = loaded_by("import jax_rlhf.rl, jax_rlhf.sampling")
    assert "jaxtyping" in loaded
    assert not {"beartype", "typeguard"} & loaded
