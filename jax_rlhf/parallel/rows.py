"""Batches of rows between hosts and a mesh: rows lie along the mesh's data and fsdp axes."""

from typing import Any

import jax
import numpy as np
from jax import Array
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


def put_rows(rows: Any, mesh: Mesh | Layout | None) -> Any:
    """This process's rows, as arrays of all processes' rows on the mesh.

    Args:
      rows: a tree of arrays [B, ...] on the host, B divisible by this process's share of `row_shards`.
      mesh: the mesh; None = the default device.

    Returns:
      The same tree of arrays, [processes · B, ...].
    """
    if mesh is None:
        return jax.tree.map(jax.numpy.asarray, rows)
    sharding = as_layout(mesh).sharding(("rows",))
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), rows)


def local_rows(array: Array) -> np.ndarray:
    """This process's rows of an array on a mesh.

    Args:
      array: [B, ...].

    Returns:
      A NumPy array of the rows that `put_rows` was given here.
    """
    if array.is_fully_addressable:
        return np.asarray(array)
    starts = {shard.index[0].start or 0: shard for shard in array.addressable_shards}  # one of each replica
    return np.concatenate([np.asarray(starts[start].data) for start in sorted(starts)])
