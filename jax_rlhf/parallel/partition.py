"""From logical axis names to mesh axes.

| logical axis          | of                                    | mesh axis |
|-----------------------|---------------------------------------|-----------|
| vocab                 | embedding table, LM head              | tensor    |
| heads, kv_heads       | attention projections                 | tensor    |
| mlp                   | the width inside the MLP              | tensor    |
| embed                 | the residual stream's side of weights | fsdp      |
| head_dim, norm, layers | —                                    | none      |

A mesh may lack any of the axes; what would lie along a missing one is replicated.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

LOGICAL_TO_MESH: Mapping[str, str | None] = {
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "embed": "fsdp",
    "head_dim": None,
    "norm": None,
    "layers": None,
}


def padded_vocab_size(vocab_size: int, mesh: Mesh) -> int:
    """The vocabulary rounded up so that the mesh axis that it lies along divides it.

    Args:
      vocab_size: V, in tokens.
      mesh: the mesh.

    Returns:
      A multiple of that axis's size, V or more.
    """
    size = mesh.shape.get(LOGICAL_TO_MESH["vocab"], 1)
    return math.ceil(vocab_size / size) * size


def shardings(axes: Any, shapes: Any, mesh: Mesh) -> Any:
    """Where each parameter goes.

    Args:
      axes: a tree of `PartitionSpec` of logical names, from `models.logical_axes`.
      shapes: the same tree of arrays or `ShapeDtypeStruct`s.
      mesh: the mesh; its axes count as Auto whatever type they have.

    Returns:
      The same tree of `NamedSharding`.

    Raises:
      ValueError: a mesh axis does not divide a parameter's axis; names both and the sizes that would work.
    """
    # `jax.make_mesh` makes Explicit axes by default, under which a contraction over a sharded axis is an error.
    mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))

    def place(path: tuple, spec: PartitionSpec, leaf: Any) -> NamedSharding:
        names = []
        for logical, size in zip(spec, leaf.shape, strict=True):
            name = LOGICAL_TO_MESH[logical] if logical else None
            name = name if name in mesh.axis_names else None
            if name and size % mesh.shape[name]:
                fits = [n for n in range(1, mesh.size + 1) if size % n == 0]
                raise ValueError(
                    f"mesh axis {name!r} of size {mesh.shape[name]} does not divide axis {logical!r} of size {size} of "
                    f"parameter {jax.tree_util.keystr(path, simple=True, separator='/')}; "
                    f"sizes of {name!r} that do: {', '.join(map(str, fits))}."
                )
            names.append(name)
        return NamedSharding(mesh, PartitionSpec(*names))

    return jax.tree_util.tree_map_with_path(place, axes, shapes, is_leaf=lambda x: isinstance(x, PartitionSpec))


def places_of(tree: Any) -> tuple:
    """Where each leaf lies: hashable, a static argument for `kept_in_place`.

    Args:
      tree: arrays.

    Returns:
      Their shardings.
    """
    return tuple(leaf.sharding for leaf in jax.tree.leaves(tree))


def kept_in_place(tree: Any, places: tuple) -> Any:
    """Leaves a jitted update where they came from: elsewhere, the next call would be another program.

    Args:
      tree: the result, inside jit.
      places: `places_of` the argument that it replaces.

    Returns:
      The tree.
    """
    leaves, form = jax.tree.flatten(tree)
    kept = [jax.lax.with_sharding_constraint(leaf, place) for leaf, place in zip(leaves, places, strict=True)]
    return jax.tree.unflatten(form, kept)


@functools.partial(jax.jit, static_argnums=2)
def _take_replicated(leaf: Array, index: Array | None, sharding: NamedSharding) -> Array:
    taken = leaf if index is None else jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False)
    return jax.lax.with_sharding_constraint(taken, sharding)


def gather_to_host(leaf: Array, index: int | None = None) -> np.ndarray:
    """One array, or one entry of a stacked one, whole on this host.

    With several processes all must call it, in the same order.

    Args:
      leaf: [...], on any devices.
      index: of the first axis, or None for the whole array.

    Returns:
      A NumPy array of the same dtype.
    """
    if isinstance(leaf, Array) and isinstance(leaf.sharding, NamedSharding) and leaf.sharding.mesh.size > 1:
        replicated = NamedSharding(leaf.sharding.mesh, PartitionSpec())
        return np.asarray(_take_replicated(leaf, index, replicated).addressable_data(0))
    return np.asarray(leaf if index is None else leaf[index])
