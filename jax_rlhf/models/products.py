"""Matrix products with weights, with operand orders that XLA on CPU need not transpose.

Training: the derivative of x · W with respect to W is xᵀ · g. JAX computes it as (gᵀ · x)ᵀ. For that, XLA on CPU
recomputes g in column order, with all arithmetic fused into it, and an update of a small model takes a fifth longer.

Decoding: with one token per row, a product mostly reads weights. XLA on CPU repacks a right operand
[*inputs, *outputs] first. It reads a left operand [*outputs, *inputs] (`project_by_output`) at full memory bandwidth.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Float32

from jax_rlhf.models.precision import product_precision


def dot_general(
    x: Float[Array, "..."], y: Float[Array, "..."], dimension_numbers: Any, preferred_element_type: Any = None
) -> Float[Array, "..."]:
    """`jax.lax.dot_general` of arrays of the same dtype; float32 products have float32 precision on every platform."""
    keywords = {"precision": product_precision(x.dtype), "preferred_element_type": preferred_element_type}
    return jax.lax.dot_general(x, y, dimension_numbers, **keywords)


@cast(
    "Callable[[Callable[..., Array]], jax.custom_vjp[Array]]", functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
)
def project(x: Float[Array, "..."], kernel: Float[Array, "..."], count: int) -> Float[Array, "..."]:
    """x · kernel, summed over the last `count` axes of x and the first `count` axes of kernel.

    Args:
      x: [..., *inputs].
      kernel: [*inputs, *outputs], of x's dtype.
      count: number of input axes.

    Returns:
      [..., *outputs].
    """
    return _project_forward(x, kernel, count)[0]


def _project_forward(
    x: Float[Array, "..."], kernel: Float[Array, "..."], count: int
) -> tuple[Float[Array, "..."], tuple[Array, Array]]:
    # A plain dot_general, because remat policies match it by name.
    return dot_general(x, kernel, ((_last(x, count), tuple(range(count))), ((), ()))), (x, kernel)


def _project_backward(
    count: int, residuals: tuple[Array, Array], gradient: Float[Array, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    x, kernel = residuals
    outputs = kernel.ndim - count
    dx = dot_general(gradient, kernel, ((_last(gradient, outputs), tuple(range(count, kernel.ndim))), ((), ())))
    leading = tuple(range(x.ndim - count))
    return dx, dot_general(x, gradient, ((leading, leading), ((), ())))


project.defvjp(_project_forward, _project_backward)


@jax.custom_vjp
def look_up_logits(hidden: Float[Array, "*batch E"], table: Float[Array, "rows E"]) -> Float32[Array, "*batch rows"]:
    """hidden · tableᵀ of arrays of the same dtype, accumulated in float32: a logit per row of the table."""
    return _logits_forward(hidden, table)[0]


def _logits_forward(
    hidden: Float[Array, "*batch E"], table: Float[Array, "rows E"]
) -> tuple[Float32[Array, "*batch rows"], tuple[Array, Array]]:
    contracting = (_last(hidden, 1), (1,))
    logits = dot_general(hidden, table, (contracting, ((), ())), preferred_element_type=jnp.float32)
    return logits, (hidden, table)


def _logits_backward(
    residuals: tuple[Array, Array], gradient: Float32[Array, "*batch rows"]
) -> tuple[Float[Array, "*batch E"], Float[Array, "rows E"]]:
    hidden, table = residuals
    gradient = gradient.astype(table.dtype)
    leading = tuple(range(hidden.ndim - 1))
    columns = dot_general(hidden, gradient, ((leading, leading), ((), ())))  # [E, rows]
    # The barrier keeps XLA from folding the transposition into the product, which would give JAX's form again.
    rows = dot_general(gradient, table, ((_last(gradient, 1), (0,)), ((), ())))
    return rows, jax.lax.optimization_barrier(columns).T


look_up_logits.defvjp(_logits_forward, _logits_backward)


def project_by_output(x: Float[Array, "..."], kernel: Float[Array, "..."], count: int) -> Float[Array, "..."]:
    """x · kernelᵀ, summed over the last `count` axes of x and of kernel.

    Args:
      x: [..., *inputs].
      kernel: [*outputs, *inputs], of x's dtype.
      count: number of input axes.

    Returns:
      [..., *outputs].
    """
    contracting = (_last(kernel, count), _last(x, count))
    y = dot_general(kernel, x, (contracting, ((), ())))  # [*outputs, ...]
    outputs = kernel.ndim - count
    return y.transpose(*range(outputs, y.ndim), *range(outputs))


def _last(x: Float[Array, "..."], count: int) -> tuple[int, ...]:
    return tuple(range(x.ndim - count, x.ndim))
