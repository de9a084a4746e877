"""Where parameters go, and where they are."""

import functools
import math
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_rlhf.parallel.layout import Layout, as_layout


def padded_vocab_size(vocab_size: int, mesh: Mesh | Layout) -> int:
    """The vocabulary rounded up so that the mesh axes that it lies along divide it.

    Args:
      vocab_size: V, in tokens.
      mesh: the mesh.

    Returns:
      A multiple of their sizes, V or more.
    """
    layout = as_layout(mesh)
    cuts = layout.cuts("vocab")
    return math.ceil(vocab_size / cuts) * cuts


def shardings(axes: Any, shapes: Any, mesh: Mesh | Layout) -> Any:
    """Where each parameter goes.

    Args:
      axes: a tree of `PartitionSpec` of logical names, from `models.logical_axes`.
      shapes: the same tree of arrays or `ShapeDtypeStruct`s.
      mesh: the mesh, or a layout.

    Returns:
      The same tree of `NamedSharding`.

    Raises:
      ValueError: a mesh axis does not divide a parameter's axis; names both and the sizes that would work.
    """
    layout = as_layout(mesh)

    def place(path: tuple, spec: PartitionSpec, leaf: Any) -> NamedSharding:
        for logical, size in zip(spec, leaf.shape, strict=True):
            cuts = layout.cuts(logical)
            if size % cuts:
                name = "+".join(layout.mesh_axes(logical))
                fits = [n for n in range(1, layout.mesh.size + 1) if size % n == 0]
                raise ValueError(
                    f"mesh axis {name!r} of size {cuts} does not divide axis {logical!r} of size {size} of "
                    f"parameter {jax.tree_util.keystr(path, simple=True, separator='/')}; "
                    f"sizes of {name!r} that do: {', '.join(map(str, fits))}."
                )
        placed = layout.spec(tuple(spec))
        return NamedSharding(layout.mesh, PartitionSpec(*placed, *(None,) * (len(leaf.shape) - len(placed))))

    return jax.tree_util.tree_map_with_path(place, axes, shapes, is_leaf=lambda x: isinstance(x, PartitionSpec))


def shardings_of(tree: Any) -> tuple:
    """The sharding of each leaf: hashable, for `constrain_to`.

    Args:
      tree: arrays.

    Returns:
      Their shardings.
    """
    return tuple(leaf.sharding for leaf in jax.tree.leaves(tree))


def constrain_to(tree: Any, shardings: tuple) -> Any:
    """The results of a jitted update with the shardings of its arguments: else the next call would be another program.

    Args:
      tree: the result, inside jit.
      shardings: `shardings_of` the argument that it replaces.

    Returns:
      The tree.
    """
    leaves, form = jax.tree.flatten(tree)
    kept = [jax.lax.with_sharding_constraint(leaf, one) for leaf, one in zip(leaves, shardings, strict=True)]
    return jax.tree.unflatten(form, kept)


@functools.partial(jax.jit, static_argnums=(2, 3))
def take_replicated(leaf: Array, index: Array | None, sharding: NamedSharding, dtype: np.dtype) -> Array:
    """An array, or one entry of a stacked one, whole on every device.

    Args:
      leaf: [...].
      index: int[], of the first axis, or None for the whole array.
      sharding: that of the result, replicated.
      dtype: that of the result, in which it is sent.

    Returns:
      The array.
    """
    taken = leaf if index is None else jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False)
    return jax.lax.with_sharding_constraint(taken.astype(dtype), sharding)


def gather_to_host(leaf: Array, index: int | None = None, dtype: np.dtype | None = None) -> np.ndarray:
    """One array, or one entry of a stacked one, whole on this host.

    With several processes all must call it, in the same order.

    Args:
      leaf: [...], on any devices.
      index: of the first axis, or None for the whole array.
      dtype: of the result; None = the same.

    Returns:
      A NumPy array.
    """
    dtype = np.dtype(leaf.dtype if dtype is None else dtype)
    if isinstance(leaf, Array) and isinstance(leaf.sharding, NamedSharding) and leaf.sharding.mesh.size > 1:
        replicated = NamedSharding(leaf.sharding.mesh, PartitionSpec())
        return np.asarray(take_replicated(leaf, index, replicated, dtype).addressable_data(0))
    return np.asarray(leaf if index is None else leaf[index]).astype(dtype, copy=False)
