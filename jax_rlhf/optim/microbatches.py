"""Splits a batch into minibatches, microbatches and row shards, and accumulates over microbatches.

batch           rows of one iteration or step, on all devices
  minibatch     rows of one optimizer step
    microbatch  rows whose activations are in memory at once; each device computes its shard of them
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, PyTree, Shaped

from jax_rlhf.parallel import Layout, row_shards


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """An even split of a batch.

    Attributes:
      rows: rows in the batch.
      num_minibatches: optimizer steps per pass over the batch.
      microbatch_size: rows per microbatch, on all devices.
    """

    rows: int
    num_minibatches: int
    microbatch_size: int

    @property
    def microbatches(self) -> int:
        """Microbatches per minibatch."""
        return self.rows // self.num_minibatches // self.microbatch_size


def plan_batch(
    rows: int,
    microbatch_size: int | None,
    layout: Layout | None,
    *,
    where: str,
    rows_field: str | None = None,
    num_minibatches: int = 1,
    tokens_per_row: int | None = None,
    platform: str = "cpu",
) -> BatchPlan:
    """Splits a batch into minibatches and microbatches.

    Args:
      rows: rows in the batch, of all processes.
      microbatch_size: rows per microbatch; None = as `microbatch_rows` chooses.
      layout: the mesh; None = one device.
      where: the config section that has these fields, for messages.
      rows_field: the config field that sets `rows`, for messages; None = the caller passed the batch.
      num_minibatches: optimizer steps per pass over the batch.
      tokens_per_row: the largest number of tokens per row, for `microbatch_rows`; None = by default a microbatch is the
        whole minibatch.
      platform: "cpu", "gpu" or "tpu".

    Raises:
      ValueError: the sizes do not divide; the message lists sizes that do.
    """
    shards, given = row_shards(layout), microbatch_size
    minibatch = rows // num_minibatches
    divides = rows % num_minibatches == 0 and minibatch % shards == 0
    if divides and given is None:
        given = minibatch if tokens_per_row is None else microbatch_rows(minibatch, tokens_per_row, shards, platform)
    if divides and given is not None and given > 0 and minibatch % given == 0 and given % shards == 0:
        return BatchPlan(rows, num_minibatches, given)
    parts = f"{num_minibatches} minibatches × " if num_minibatches > 1 else ""
    if not divides:
        batch = f"a batch of {rows} rows" if rows_field is None else f"{rows_field}={rows}"
        named = f"{where}.num_minibatches={num_minibatches} minibatches over " if parts else ""
        raise ValueError(
            f"{batch} cannot be cut evenly into {named}the mesh's {shards} row shards (data × fsdp); "
            f"give a multiple of {parts}{shards} row shards = {num_minibatches * shards} rows."
        )
    fits = [n for n in range(shards, minibatch + 1, shards) if minibatch % n == 0]
    whole = "minibatch" if parts else "batch"
    raise ValueError(
        f"{where}.microbatch_size={given} does not divide a {whole} of {minibatch} rows, or is no multiple "
        f"of the mesh's {shards} row shards (data × fsdp); sizes that do: {', '.join(map(str, fits))}."
    )


def microbatch_rows(rows: int, tokens_per_row: int, shards: int, platform: str) -> int:
    """The largest microbatch size that divides the minibatch and stays within a budget of tokens per device.

    The budget is 1,024 tokens on CPU, where the activations of more tokens do not fit the caches, and 16,384 on GPU and
    TPU.

    Args:
      rows: rows in a minibatch.
      tokens_per_row: P + R.
      shards: number of row shards of the mesh.
      platform: "cpu", "gpu" or "tpu".

    Returns:
      A divisor of `rows` and multiple of `shards`; the smallest such number if none is within the budget.
    """
    budget = (1024 if platform == "cpu" else 16_384) * shards
    fits = [n for n in range(shards, rows + 1, shards) if rows % n == 0]
    return max((n for n in fits if n * tokens_per_row <= budget), default=fits[0])


def accumulate(
    function: Callable[[Any], Any],
    parts: PyTree[Shaped[Array, "microbatches ..."]],
    *,
    add: Callable[[Any, Any], Any] | None = None,
) -> PyTree[Shaped[Array, "..."]]:
    """Σ function(part) over microbatches, in a scan, so that the activations of only one microbatch are in memory.

    Args:
      function: a microbatch → a tree of arrays, such as gradients and sums; under `jit`.
      parts: leaves [microbatches, rows, …].
      add: adds two such trees; None = leaf by leaf.
    """
    add = add or (lambda total, more: jax.tree.map(jnp.add, total, more))
    first = jax.tree.map(lambda leaf: leaf[0], parts)
    if len(jax.tree.leaves(parts)[0]) == 1:
        return function(first)
    function = jax.jit(function, inline=True)  # so that it is traced once for both uses
    total = _zeros_like_result(lambda: function(first))
    return jax.lax.scan(lambda total, part: (add(total, function(part)), None), total, parts)[0]


def zeros_if(zero: Bool[Array, ""], function: Callable[[], Any]) -> PyTree[Shaped[Array, "..."]]:
    """function(), or zeros of the same shapes and dtypes, in which case the function is not run; under `jit`."""
    function = jax.jit(function, inline=True)  # so that it is traced once for both uses
    return jax.lax.cond(zero, lambda: _zeros_like_result(function), function)


def _zeros_like_result(function: Callable[[], Any]) -> PyTree[Shaped[Array, "..."]]:
    """Zeros with the shapes and dtypes that a function returns; the function is traced but not run."""

    def zeros(leaf: jax.ShapeDtypeStruct) -> Shaped[Array, "..."]:
        return jnp.zeros(leaf.shape, leaf.dtype)

    return jax.tree.map(zeros, jax.eval_shape(function))
