"""What numbers mean, whatever program they are computed in.

bfloat16: XLA may leave out the rounding between two operations that it fuses (`xla_allow_excess_precision`). Which it
fuses depends on the program, so that the sampler, the scorer and the update would each compute other log-probs of the
same tokens. `model_jit` forbids it: each operation rounds as the code says, in every program.

float32: a product of float32 matrices is computed from bfloat16 parts on TPU and from TensorFloat-32 on GPU, unless a
precision is asked for. `product_precision` asks for float32 where JAX's `jax_default_matmul_precision` is not set.
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


def model_jit(function: Callable, **how: Any) -> Program:
    """`jax.jit` for functions that run a model: each operation rounds as the code says.

    Args:
      function: what to compile.
      how: arguments of `jax.jit`.

    Returns:
      The function, with `lower`, `trace` and `eval_shape` as `jax.jit` has them. Under another `jit` that one's options
      count, since JAX takes them for a whole program only.
    """
    compiled, inside = jax.jit(function, compiler_options=_OPTIONS, **how), jax.jit(function, **how)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (inside if traced(args, kwargs) else compiled)(*args, **kwargs)

    program = cast(Program, call)
    program.lower, program.trace, program.eval_shape = compiled.lower, compiled.trace, compiled.eval_shape
    return program


def traced(*trees: Any) -> bool:
    """Whether a function is called by a transformation of JAX.

    Args:
      trees: its arguments.

    Returns:
      Whether any leaf is a tracer.
    """
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(trees))


def narrowed(params: Any, dtypes: Any) -> Any:
    """Parameters that do not train, in no wider a dtype than they are computed in.

    Args:
      params: a tree of arrays.
      dtypes: `compute_dtypes`, in the same tree.

    Returns:
      The tree; leaves that are as narrow already are the same.
    """
    return jax.tree.map(
        lambda leaf, dtype: leaf.astype(dtype) if dtype.itemsize < leaf.dtype.itemsize else leaf, params, dtypes
    )


def product_precision(dtype: Any) -> jax.lax.Precision | None:
    """The precision of a product of two arrays of a dtype.

    Args:
      dtype: of both.

    Returns:
      The highest for float32; None, JAX's default, for other dtypes, whose products are exact in float32, and where
      `jax_default_matmul_precision` (or the context manager of that name) says what is wanted.
    """
    wanted = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue] -- JAX adds its flags at run time
    if jnp.dtype(dtype) != jnp.float32 or wanted is not None:
        return None
    return jax.lax.Precision.HIGHEST
