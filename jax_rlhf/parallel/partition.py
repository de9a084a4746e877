"""Shardings of parameters, and arrays gathered to the host."""

import functools
import math
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_rlhf.parallel.layout import Layout, as_layout


def padded_vocab_size(vocab_size: int, mesh: Mesh | Layout) -> int:
    """The vocabulary size, rounded up to a multiple of the number of its shards."""
    shards = as_layout(mesh).num_shards("vocab")
    return math.ceil(vocab_size / shards) * shards


def shardings(axes: Any, shapes: Any, mesh: Mesh | Layout) -> Any:
    """The sharding of each parameter.

    Args:
      axes: a tree of `PartitionSpec` of logical names, from `models.logical_axes`.
      shapes: a tree of the same structure, of arrays or `ShapeDtypeStruct`s.
      mesh: the mesh, or a layout.

    Returns:
      A tree of the same structure, of `NamedSharding`.

    Raises:
      ValueError: a mesh axis does not divide a parameter's axis; the message names both and the sizes that would do.
    """
    layout = as_layout(mesh)

    def sharding(path: tuple, spec: PartitionSpec, leaf: Any) -> NamedSharding:
        for logical, size in zip(spec, leaf.shape, strict=True):
            shards = layout.num_shards(logical)
            if size % shards:
                name = "+".join(layout.mesh_axes(logical))
                fits = [n for n in range(1, layout.mesh.size + 1) if size % n == 0]
                raise ValueError(
                    f"mesh axis {name!r} of size {shards} does not divide axis {logical!r} of size {size} of "
                    f"parameter {jax.tree_util.keystr(path, simple=True, separator='/')}; "
                    f"sizes of {name!r} that do: {', '.join(map(str, fits))}."
                )
        mesh_axes = layout.spec(tuple(spec))
        return NamedSharding(layout.mesh, PartitionSpec(*mesh_axes, *(None,) * (len(leaf.shape) - len(mesh_axes))))

    return jax.tree_util.tree_map_with_path(sharding, axes, shapes, is_leaf=lambda x: isinstance(x, PartitionSpec))


def shardings_of(tree: Any) -> tuple:
    """The sharding of each leaf, as a hashable tuple for `constrain_to`."""
    return tuple(leaf.sharding for leaf in jax.tree.leaves(tree))


def constrain_to(tree: Any, shardings: tuple) -> Any:
    """Constrains the result of a jitted update to the shardings of the argument that it replaces.

    Without this XLA may choose other shardings, and the next call would be compiled again.

    Args:
      tree: the result, inside jit.
      shardings: `shardings_of` the argument that it replaces.
    """
    leaves, treedef = jax.tree.flatten(tree)
    leaves = [jax.lax.with_sharding_constraint(leaf, one) for leaf, one in zip(leaves, shardings, strict=True)]
    return jax.tree.unflatten(treedef, leaves)


@functools.partial(jax.jit, static_argnums=(2, 3))
def take_replicated(leaf: Array, index: Array | None, sharding: NamedSharding, dtype: np.dtype) -> Array:
    """Replicates an array, or one entry of a stacked array, on every device.

    Args:
      leaf: [...].
      index: int[], into the first axis, or None for the whole array.
      sharding: the replicated sharding of the result.
      dtype: of the result. The cast comes before the transfer.
    """
    taken = leaf if index is None else jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False)
    return jax.lax.with_sharding_constraint(taken.astype(dtype), sharding)


def gather_to_host(leaf: Array, index: int | None = None, dtype: np.dtype | None = None) -> np.ndarray:
    """Gathers an array, or one entry of a stacked array, on this host.

    With several processes all must call it, in the same order.

    Args:
      leaf: [...], on any devices.
      index: into the first axis, or None for the whole array.
      dtype: of the result; None = the array's own.
    """
    dtype = np.dtype(leaf.dtype if dtype is None else dtype)
    if isinstance(leaf, Array) and isinstance(leaf.sharding, NamedSharding) and leaf.sharding.mesh.size > 1:
        replicated = NamedSharding(leaf.sharding.mesh, PartitionSpec())
        return np.asarray(take_replicated(leaf, index, replicated, dtype).addressable_data(0))
    return np.asarray(leaf if index is None else leaf[index]).astype(dtype, copy=False)
