"""Batches of rows between hosts and a mesh: rows lie along the mesh's data and fsdp axes.

Which process holds which rows follows from the mesh alone. Where `tensor` reaches over hosts, several processes hold
the same rows; the first of them *owns* them: what must be done once a row (a reward function, a sample written down) is
done there, and told to the others.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jax_rlhf.parallel.layout import Layout, as_layout


def row_shards(mesh: Mesh | Layout | None) -> int:
    """Into how many parts a batch's rows are cut.

    Args:
      mesh: the mesh; None = one device.

    Returns:
      1 or more.
    """
    return 1 if mesh is None else as_layout(mesh).cuts("rows")


def local_row_indices(batch: int, mesh: Mesh | Layout | None) -> np.ndarray:
    """The rows of a batch that this process's devices hold, which it has to lay out.

    Args:
      batch: B, rows of all processes.
      mesh: the mesh; None = one device.

    Returns:
      int[b], ascending.

    Raises:
      ValueError: the mesh does not divide the batch; says what it divides.
    """
    return np.concatenate([np.arange(*part) for part in _parts(batch, mesh)[0]])


def owned_rows(batch: int, mesh: Mesh | Layout | None) -> np.ndarray:
    """Which of `local_row_indices` no earlier process holds.

    Args:
      batch: B, rows of all processes.
      mesh: the mesh; None = one device.

    Returns:
      bool[b].
    """
    held, owners = _parts(batch, mesh)
    return np.concatenate([np.full(stop - start, owners[start, stop] == jax.process_index()) for start, stop in held])


def _parts(batch: int, mesh: Mesh | Layout | None) -> tuple[list[tuple[int, int]], dict[tuple[int, int], int]]:
    """(start, stop) of the parts that this process holds, ascending, and the first process that holds each part."""
    if mesh is None:
        return [(0, batch)], {(0, batch): 0}
    shards = row_shards(mesh)
    if batch % shards:
        raise ValueError(
            f"a batch of {batch} rows cannot be cut over the mesh's {shards} row shards (data × fsdp); give a multiple."
        )
    holders: dict[tuple[int, int], set[int]] = {}
    for device, (rows,) in as_layout(mesh).sharding(("rows",)).devices_indices_map((batch,)).items():
        part = rows.indices(batch)[:2]
        holders.setdefault(part, set()).add(device.process_index)
    held = sorted(part for part, processes in holders.items() if jax.process_index() in processes)
    return held, {part: min(processes) for part, processes in holders.items()}


def batch_rows(held: int, mesh: Mesh | Layout | None) -> int:
    """Rows of the whole batch.

    Args:
      held: rows that this process holds.
      mesh: the mesh; None = one device.

    Returns:
      B.
    """
    shards = row_shards(mesh)
    return held * shards // len(_parts(shards, mesh)[0])


def split_row_groups(rows: Any, count: int, mesh: Mesh | Layout | None) -> Any:
    """Rows of a batch in groups, each with as many rows of every device as any other: nothing moves between devices.

    Args:
      rows: a tree of arrays [B, ...].
      count: n, of groups.
      mesh: the mesh, whose row shards divide B / n; None = one device.

    Returns:
      The tree of arrays [n, B / n, ...].
    """
    shards = row_shards(mesh)

    def split(leaf: Array) -> Array:
        parts = leaf.reshape(shards, count, -1, *leaf.shape[1:])
        return parts.swapaxes(0, 1).reshape(count, -1, *leaf.shape[1:])

    return jax.tree.map(split, rows)


def join_row_groups(groups: Any, mesh: Mesh | Layout | None) -> Any:
    """What `split_row_groups` was given.

    Args:
      groups: a tree of arrays [n, B / n, ...].
      mesh: as there.

    Returns:
      The tree of arrays [B, ...].
    """
    shards = row_shards(mesh)

    def join(leaf: Array) -> Array:
        parts = leaf.reshape(len(leaf), shards, -1, *leaf.shape[2:])
        return parts.swapaxes(0, 1).reshape(-1, *leaf.shape[2:])

    return jax.tree.map(join, groups)


def map_row_groups(function: Callable[[Any], Any], rows: Any, count: int, mesh: Mesh | Layout | None) -> Any:
    """A function of rows, over one group of them after the other, so that only one group's activations exist.

    Args:
      function: a tree of arrays [b, ...] → a tree of arrays [b, ...], each row of it by itself; under `jit`.
      rows: a tree of arrays [B, ...].
      count: of groups.
      mesh: as in `split_row_groups`.

    Returns:
      The function's results, [B, ...].
    """
    if count == 1:
        return function(rows)
    return join_row_groups(jax.lax.map(function, split_row_groups(rows, count, mesh)), mesh)


def put_rows(rows: Any, mesh: Mesh | Layout | None) -> Any:
    """This process's rows, as arrays of all processes' rows on the mesh.

    Args:
      rows: a tree of arrays [b, ...] on the host, the `local_row_indices` of a batch.
      mesh: the mesh; None = the default device.

    Returns:
      The same tree of arrays, [B, ...].
    """
    if mesh is None:
        return jax.tree.map(jax.device_put, rows)
    sharding = as_layout(mesh).sharding(("rows",))

    def put(leaf: Any) -> Array:
        leaf = np.asarray(leaf)
        whole = (batch_rows(len(leaf), mesh), *leaf.shape[1:])
        return jax.make_array_from_process_local_data(sharding, leaf, whole)

    return jax.tree.map(put, rows)


def local_rows(array: Array) -> np.ndarray:
    """This process's rows of an array on a mesh.

    Args:
      array: [B, ...].

    Returns:
      A NumPy array [b, ...] of the rows that `put_rows` was given here.
    """
    if array.is_fully_addressable:
        return np.asarray(array)
    starts = {shard.index[0].start or 0: shard for shard in array.addressable_shards}  # one of each replica
    return np.concatenate([np.asarray(starts[start].data) for start in sorted(starts)])


def all_rows(rows: np.ndarray, mesh: Mesh | Layout | None) -> np.ndarray:
    """All processes' rows on every process, each from its owner; all processes must call it.

    Args:
      rows: [b, ...], numbers or bools, this process's; what stands in rows that others own is not looked at.
      mesh: the mesh; None = one device.

    Returns:
      [B, ...].
    """
    rows = np.asarray(rows)
    if jax.process_count() == 1:
        return rows
    batch = batch_rows(len(rows), mesh)
    whole = np.zeros((batch, *rows.shape[1:]), rows.dtype)
    mine = owned_rows(batch, mesh)
    whole[local_row_indices(batch, mesh)[mine]] = rows[mine]
    parts = multihost_utils.process_allgather(whole)  # [processes, B, ...], each row from one of them
    return parts.sum(axis=0).astype(rows.dtype) if rows.dtype != bool else parts.any(axis=0)


def gather_rows(array: Array) -> np.ndarray:
    """All rows of an array on a mesh, on every process. All processes must call it.

    Args:
      array: [B, ...].

    Returns:
      A NumPy array [B, ...].
    """
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
