"""Products with weights, in the orders of operands that XLA on CPU need not turn round.

Training: the derivative of x · W by W is xᵀ · g. JAX writes it (gᵀ · x)ᵀ, for which XLA on CPU computes g once more, in
columns, with all the arithmetic that was fused into it: an update of a small model then takes a fifth longer.

Decoding: with a token a row a product reads more weights than anything else. [*inputs, *outputs] on the right XLA packs
first; [*outputs, *inputs] on the left (`project_by_output`) it reads as fast as memory gives them.
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
    """`jax.lax.dot_general`, in which float32 is float32 on every device.

    Args:
      x, y: of one dtype.
      dimension_numbers, preferred_element_type: as there.

    Returns:
      The product.
    """
    how = {"precision": product_precision(x.dtype), "preferred_element_type": preferred_element_type}
    return jax.lax.dot_general(x, y, dimension_numbers, **how)


@cast(
    "Callable[[Callable[..., Array]], jax.custom_vjp[Array]]", functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
)
def project(x: Float[Array, "..."], kernel: Float[Array, "..."], count: int) -> Float[Array, "..."]:
    """x · kernel over the last `count` axes of x, which are the first of the kernel.

    Args:
      x: [..., *inputs].
      kernel: [*inputs, *outputs], of x's dtype.
      count: how many inputs there are.

    Returns:
      [..., *outputs].
    """
    return _project_forward(x, kernel, count)[0]


def _project_forward(
    x: Float[Array, "..."], kernel: Float[Array, "..."], count: int
) -> tuple[Float[Array, "..."], tuple[Array, Array]]:
    # A bare dot_general: remat policies look for it by name.
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
    """hidden · tableᵀ, in float32.

    Args:
      hidden: what a head reads.
      table: of the same dtype.

    Returns:
      A logit per row of the table.
    """
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
    # The barrier keeps XLA from folding the transposition into the product, which is JAX's form again.
    rows = dot_general(gradient, table, ((_last(gradient, 1), (0,)), ((), ())))
    return rows, jax.lax.optimization_barrier(columns).T


look_up_logits.defvjp(_logits_forward, _logits_backward)


def project_by_output(x: Float[Array, "..."], kernel: Float[Array, "..."], count: int) -> Float[Array, "..."]:
    """x · kernelᵀ over the last `count` axes of x, which are the last of the kernel.

    Args:
      x: [..., *inputs].
      kernel: [*outputs, *inputs], of x's dtype.
      count: how many inputs there are.

    Returns:
      [..., *outputs].
    """
    contracting = (_last(kernel, count), _last(x, count))
    y = dot_general(kernel, x, (contracting, ((), ())))  # [*outputs, ...]
    outputs = kernel.ndim - count
    return y.transpose(*range(outputs, y.ndim), *range(outputs))


def _last(x: Float[Array, "..."], count: int) -> tuple[int, ...]:
    return tuple(range(x.ndim - count, x.ndim))
