"""Reproducible numerics: the same rounding in every program.

bfloat16: XLA may omit the rounding between two operations that it fuses (`xla_allow_excess_precision`). Which
operations it fuses depends on the program, so sampler, scorer and update would compute different log-probs of the same
tokens. `model_jit` turns this off: every operation rounds as written, in every program.

float32: by default, products of float32 matrices use bfloat16 on TPU and TensorFloat-32 on GPU. `product_precision`
requests float32 unless `jax_default_matmul_precision` is set.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
from jax.core import Tracer

_OPTIONS = {"xla_allow_excess_precision": False}


class Program(Protocol):
    """A jitted function."""

    __wrapped__: Callable
    lower: Callable
    trace: Callable
    eval_shape: Callable

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...  # noqa: D102


def model_jit(function: Callable, **keywords: Any) -> Program:
    """`jax.jit` for functions that run a model: every operation rounds as written.

    Args:
      function: the function to compile.
      keywords: arguments of `jax.jit`.

    Returns:
      The function, with `lower`, `trace` and `eval_shape` as `jax.jit` has them. Inside another `jit` the options of
      the outer one apply, since JAX accepts compiler options for a whole program only.
    """
    compiled, inner = jax.jit(function, compiler_options=_OPTIONS, **keywords), jax.jit(function, **keywords)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (inner if traced(args, kwargs) else compiled)(*args, **kwargs)

    program = cast(Program, call)
    program.lower, program.trace, program.eval_shape = compiled.lower, compiled.trace, compiled.eval_shape
    return program


def traced(*trees: Any) -> bool:
    """Whether any leaf is a tracer: the function with these arguments is called under a JAX transformation."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(trees))


def narrowed(params: Any, dtypes: Any) -> Any:
    """Casts frozen parameters to the dtype that they are computed in, if that is narrower; other leaves are unchanged.

    Args:
      params: a tree of arrays.
      dtypes: `compute_dtypes`, a tree of the same structure.
    """
    return jax.tree.map(
        lambda leaf, dtype: leaf.astype(dtype) if dtype.itemsize < leaf.dtype.itemsize else leaf, params, dtypes
    )


def product_precision(dtype: Any) -> jax.lax.Precision | None:
    """The precision for a product of two arrays of this dtype.

    Returns:
      HIGHEST for float32. None (JAX's default) for other dtypes, whose products are exact in float32, and if the user
      sets `jax_default_matmul_precision` (or its context manager).
    """
    default = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue] -- JAX adds its flags at run time
    if jnp.dtype(dtype) != jnp.float32 or default is not None:
        return None
    return jax.lax.Precision.HIGHEST
