"""Moves batches between hosts and a mesh. The rows of a batch are sharded over the mesh axes data and fsdp.

The mesh alone decides which rows are local to which process. Where `tensor` crosses hosts, the same rows are local to
several processes. The first of these processes *owns* them: work that must happen once per row (a reward function,
writing a sample) is done there, and its result is sent to the others.

Shapes: B = rows of the global batch, b = rows that are local to this process.
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
    """The number of shards of a batch's rows; 1 without a mesh."""
    return 1 if mesh is None else as_layout(mesh).num_shards("rows")


def local_row_indices(batch: int, mesh: Mesh | Layout | None) -> np.ndarray:
    """Indices of the rows that lie on this process's devices, and which it therefore has to provide.

    Args:
      batch: B, rows of the global batch.
      mesh: the mesh; None = one device.

    Returns:
      int[b], ascending.

    Raises:
      ValueError: B is not a multiple of the number of row shards.
    """
    return np.concatenate([np.arange(*part) for part in _parts(batch, mesh)[0]])


def owned_rows(batch: int, mesh: Mesh | Layout | None) -> np.ndarray:
    """Which of `local_row_indices` this process owns, that is, which are not local to an earlier process too.

    Args:
      batch: B, rows of the global batch.
      mesh: the mesh; None = one device.

    Returns:
      bool[b].
    """
    local, owners = _parts(batch, mesh)
    return np.concatenate([np.full(stop - start, owners[start, stop] == jax.process_index()) for start, stop in local])


def _parts(batch: int, mesh: Mesh | Layout | None) -> tuple[list[tuple[int, int]], dict[tuple[int, int], int]]:
    """(start, stop) of each row shard that is local to this process, ascending; and the owner of every row shard."""
    if mesh is None:
        return [(0, batch)], {(0, batch): 0}
    shards = row_shards(mesh)
    if batch % shards:
        raise ValueError(
            f"a batch of {batch} rows cannot be split over the mesh's {shards} row shards (data × fsdp): use a "
            f"multiple of {shards}."
        )
    processes_by_part: dict[tuple[int, int], set[int]] = {}
    for device, (rows,) in as_layout(mesh).sharding(("rows",)).devices_indices_map((batch,)).items():
        part = rows.indices(batch)[:2]
        processes_by_part.setdefault(part, set()).add(device.process_index)
    local = sorted(part for part, processes in processes_by_part.items() if jax.process_index() in processes)
    return local, {part: min(processes) for part, processes in processes_by_part.items()}


def batch_rows(local: int, mesh: Mesh | Layout | None) -> int:
    """B, the rows of the global batch, from b, the number of local rows."""
    shards = row_shards(mesh)
    return local * shards // len(_parts(shards, mesh)[0])


def split_row_groups(rows: Any, count: int, mesh: Mesh | Layout | None) -> Any:
    """Splits a batch into groups. Each takes the same number of rows from every device, so no row changes its device.

    Args:
      rows: a tree of arrays [B, ...].
      count: n, the number of groups; the number of row shards divides B / n.
      mesh: the mesh; None = one device.

    Returns:
      The tree of arrays [n, B / n, ...].
    """
    shards = row_shards(mesh)

    def split(leaf: Array) -> Array:
        parts = leaf.reshape(shards, count, -1, *leaf.shape[1:])  # [shards, n, B / (n shards), ...]
        return parts.swapaxes(0, 1).reshape(count, -1, *leaf.shape[1:])

    return jax.tree.map(split, rows)


def join_row_groups(groups: Any, mesh: Mesh | Layout | None) -> Any:
    """The inverse of `split_row_groups`.

    Args:
      groups: a tree of arrays [n, B / n, ...].
      mesh: as in `split_row_groups`.

    Returns:
      The tree of arrays [B, ...].
    """
    shards = row_shards(mesh)

    def join(leaf: Array) -> Array:
        parts = leaf.reshape(len(leaf), shards, -1, *leaf.shape[2:])  # [n, shards, B / (n shards), ...]
        return parts.swapaxes(0, 1).reshape(-1, *leaf.shape[2:])

    return jax.tree.map(join, groups)


def map_row_groups(function: Callable[[Any], Any], rows: Any, count: int, mesh: Mesh | Layout | None) -> Any:
    """Applies a function to one group of rows after the other, so that only one group's activations exist at a time.

    Args:
      function: maps a tree of arrays [B / n, ...] to a tree of arrays [B / n, ...], each row independently of the
        others; traced under `jit`.
      rows: a tree of arrays [B, ...].
      count: n, the number of groups.
      mesh: as in `split_row_groups`.

    Returns:
      The function's results, [B, ...].
    """
    if count == 1:
        return function(rows)
    return join_row_groups(jax.lax.map(function, split_row_groups(rows, count, mesh)), mesh)


def put_rows(rows: Any, mesh: Mesh | Layout | None) -> Any:
    """Makes global arrays on the mesh from the local rows of each process.

    Args:
      rows: a tree of arrays [b, ...] on the host, the `local_row_indices` of a batch.
      mesh: the mesh; None = the default device.

    Returns:
      The tree of arrays [B, ...].
    """
    if mesh is None:
        return jax.tree.map(jax.device_put, rows)
    sharding = as_layout(mesh).sharding(("rows",))

    def put(leaf: Any) -> Array:
        leaf = np.asarray(leaf)
        shape = (batch_rows(len(leaf), mesh), *leaf.shape[1:])  # [B, ...]
        return jax.make_array_from_process_local_data(sharding, leaf, shape)

    return jax.tree.map(put, rows)


def local_rows(array: Array) -> np.ndarray:
    """The local rows of an array on a mesh, as `put_rows` got them on this process.

    Args:
      array: [B, ...].

    Returns:
      [b, ...].
    """
    if array.is_fully_addressable:
        return np.asarray(array)
    starts = {shard.index[0].start or 0: shard for shard in array.addressable_shards}  # keeps one of several replicas
    return np.concatenate([np.asarray(starts[start].data) for start in sorted(starts)])


def all_rows(rows: np.ndarray, mesh: Mesh | Layout | None) -> np.ndarray:
    """Gathers the rows of all processes on every process, each row from its owner; all processes must call it.

    Args:
      rows: [b, ...], local rows of numbers or bools; those that another process owns are ignored.
      mesh: the mesh; None = one device.

    Returns:
      [B, ...].
    """
    rows = np.asarray(rows)
    if jax.process_count() == 1:
        return rows
    batch = batch_rows(len(rows), mesh)
    own_part = np.zeros((batch, *rows.shape[1:]), rows.dtype)  # [B, ...], zero in rows that others own
    owned = owned_rows(batch, mesh)
    own_part[local_row_indices(batch, mesh)[owned]] = rows[owned]
    parts = multihost_utils.process_allgather(own_part)  # [processes, B, ...], each row nonzero in one process at most
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
