"""Which mesh axes shard which axis of an array: one table for parameters, activations and KV caches.

| logical axis | axis of | mesh axes |
|---|---|---|
| vocab | embedding table, LM head, logits | tensor |
| heads, kv_heads | attention projections, queries, keys, values, KV caches | tensor |
| mlp | hidden width of the MLP | tensor |
| embed | the axis of a weight that has the model width | fsdp |
| rows | rows of a batch | data, fsdp |
| drawn_rows | rows of logits from which tokens are sampled; each row has the whole vocabulary | data, fsdp, tensor |
| hidden | the model width of activations | — |
| head_dim, norm, layers, length | — | — |

So a weight is sharded over `fsdp` along one axis and over `tensor` along the other. XLA gathers the `fsdp` shards
before use, one layer at a time, and sums the partial results over `tensor` after it. `config.mesh.rules` overrides
entries of the table: `("mlp=tensor+fsdp", "embed=")`.

A mesh may lack any of these axes; an array axis that would be sharded over a missing one is replicated.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, overload

import jax
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")

LOGICAL_TO_MESH: Mapping[str, tuple[str, ...]] = {
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "embed": ("fsdp",),
    "rows": ("data", "fsdp"),
    "drawn_rows": ("data", "fsdp", "tensor"),
    "hidden": (),
    "head_dim": (),
    "norm": (),
    "layers": (),
    "length": (),
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and its table of shardings. It is hashable, and a static part of every model that runs on the mesh.

    Attributes:
      mesh: the devices; its axes are treated as Auto, whatever their type.
      overrides: (logical axis, mesh axes) of each entry that differs from `LOGICAL_TO_MESH`.
      rollout: for sampling, (the size of `fsdp`, the factor by which `tensor` grows); None = chosen from the model's
        sizes (`rollout_layout`).
      devices_per_machine: so many devices with consecutive ids share fast links, such as the GPUs of a machine. None =
        ask the devices themselves; those of a simulated topology cannot tell.
    """

    mesh: Mesh
    overrides: tuple[tuple[str, tuple[str, ...]], ...] = ()
    rollout: tuple[int, int] | None = None
    devices_per_machine: int | None = None

    def __post_init__(self) -> None:
        # `jax.make_mesh` makes Explicit axes by default. With these a contraction over a sharded axis is an error.
        auto = (AxisType.Auto,) * len(self.mesh.axis_names)
        object.__setattr__(self, "mesh", Mesh(self.mesh.devices, self.mesh.axis_names, axis_types=auto))

    @property
    def platform(self) -> str:
        """The kind of its devices: "cpu", "gpu" or "tpu"."""
        platform = self.mesh.devices.flat[0].platform
        return platform if platform in ("cpu", "tpu") else "gpu"

    def mesh_axes(self, logical: str | None) -> tuple[str, ...]:
        """The mesh axes over which a logical axis is sharded; axes that the mesh lacks are left out."""
        if logical is None:
            return ()
        axes = dict(self.overrides).get(logical, LOGICAL_TO_MESH[logical])
        return tuple(axis for axis in axes if axis in self.mesh.axis_names)

    def num_shards(self, logical: str | None) -> int:
        """The number of shards of a logical axis."""
        return math.prod(self.mesh.shape[axis] for axis in self.mesh_axes(logical))

    def spec(self, axes: Sequence[str | None], shape: Sequence[int] | None = None) -> PartitionSpec:
        """The partition spec of an array. Each mesh axis is used once: the first logical axis that wants it gets it.

        Args:
          axes: logical names of the array's axes.
          shape: the array's sizes. If the mesh axes of one do not divide it, the last of them are left out until the
            rest do. None = every size is divisible.
        """
        used: set[str] = set()
        parts = []
        for index, logical in enumerate(axes):
            names = tuple(name for name in self.mesh_axes(logical) if name not in used)
            while shape is not None and shape[index] % math.prod(self.mesh.shape[name] for name in names):
                names = names[:-1]
            used.update(names)
            parts.append(names[0] if len(names) == 1 else names or None)
        while parts and parts[-1] is None:  # jit returns specs without trailing None, and compares them literally
            parts.pop()
        return PartitionSpec(*parts)

    def sharding(self, axes: Sequence[str | None], shape: Sequence[int] | None = None) -> NamedSharding:
        """The sharding of an array on this mesh; arguments as for `spec`."""
        return NamedSharding(self.mesh, self.spec(axes, shape))


@overload
def as_layout(mesh: Mesh | Layout) -> Layout: ...
@overload
def as_layout(mesh: None) -> None: ...
@overload
def as_layout(mesh: Mesh | Layout | None) -> Layout | None: ...
def as_layout(mesh: Mesh | Layout | None) -> Layout | None:
    """Normalizes the `mesh` argument of public functions.

    Args:
      mesh: a mesh, which gets the default table; a layout; or None for one device.
    """
    return mesh if mesh is None or isinstance(mesh, Layout) else Layout(mesh)


def parse_rules(rules: Iterable[str]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Parses `config.mesh.rules` to `Layout.overrides`.

    Args:
      rules: each "logical=mesh+mesh"; nothing after the = means replicated.

    Raises:
      ValueError: an unknown axis; the message lists the known ones.
    """
    parsed = []
    for rule in rules:
        logical, equals, axes = rule.partition("=")
        names = tuple(name.strip() for name in axes.split("+") if name.strip())
        if not equals or logical.strip() not in LOGICAL_TO_MESH or not set(names) <= set(MESH_AXES):
            raise ValueError(
                f'config.mesh.rules: {rule!r} is not of the form "logical=mesh+mesh", with logical one of '
                f"{', '.join(LOGICAL_TO_MESH)}, and mesh of {', '.join(MESH_AXES)}."
            )
        parsed.append((logical.strip(), names))
    return tuple(parsed)


def constrained(x: Array, layout: Layout | None, *axes: str | None) -> Array:
    """Constrains an array inside jit to the sharding of its logical axes; XLA might otherwise choose another.

    Args:
      x: any array.
      layout: the layout; None = one device, and x is returned unchanged.
      axes: the logical name of each axis of `x`.
    """
    return x if layout is None else jax.lax.with_sharding_constraint(x, layout.sharding(axes, x.shape))


def lookup_layout(layout: Layout | None) -> Layout | None:
    """The layout for embedding lookup: mesh axes that shard the embedding table do not shard the batch."""
    if layout is None:
        return None
    table_axes = {*layout.mesh_axes("vocab"), *layout.mesh_axes("embed")}
    rows = tuple(axis for axis in layout.mesh_axes("rows") if axis not in table_axes)
    others = tuple(entry for entry in layout.overrides if entry[0] != "rows")
    return dataclasses.replace(layout, overrides=(*others, ("rows", rows)))


def rollout_layout(layout: Layout, divided: Sequence[int]) -> Layout:
    """The layout for sampling, where a weight sharded over `fsdp` would have to be gathered for every token.

    `config.rollout_mesh` sets the sizes. By default `fsdp` is 1: as many of its devices as possible move to `tensor`,
    and the rest to `data`. The model's sizes limit `tensor`, and so do fast links: each token costs two all-reduces
    over `tensor` per layer, so `tensor` stays within a machine of GPUs. With 8 key/value heads and fsdp=8 the result is
    tensor=8, which needs as much memory per device as before.

    Args:
      layout: the layout for training.
      divided: sizes that `tensor` must divide: key/value heads, heads, MLP width. (A vocabulary that it does not divide
        is sharded over fewer devices.)

    Returns:
      A layout on the same devices in the same order; `reshard_steps` says how to get there.

    Raises:
      ValueError: the configured sizes do not divide the model's; the message lists sizes that do.

    Source: the idea is DeepSpeed-Chat's Hybrid Engine (Yao et al. 2023).
    """
    fsdp, tensor = (layout.mesh.shape.get(axis, 1) for axis in ("fsdp", "tensor"))
    fits = [n for n in range(1, fsdp + 1) if fsdp % n == 0 and not any(size % (n * tensor) for size in divided)]
    if layout.rollout is None:
        return _split_layout(layout, 1, max((n for n in fits if _share_fast_links(layout, n * tensor)), default=1))
    kept, extra = layout.rollout
    if extra not in fits and extra > 1:
        raise ValueError(
            f"config.rollout_mesh.tensor={extra * tensor} does not divide the model's key/value heads, heads and MLP "
            f"width ({', '.join(map(str, divided))}); {', '.join(str(n * tensor) for n in fits)} would."
        )
    return _split_layout(layout, kept, extra)


def tensor_has_fast_links(layout: Layout) -> bool:
    """Whether all devices along `tensor` share fast links; if not, its all-reduces go over the network."""
    return _share_fast_links(layout, math.prod(layout.mesh.shape.get(axis, 1) for axis in ("fsdp_to_tensor", "tensor")))


def _share_fast_links(layout: Layout, size: int) -> bool:
    """Whether each group of `size` consecutive devices of the mesh lies in one machine or slice."""
    machines = [machine_of(device, layout.devices_per_machine) for device in layout.mesh.devices.flat]
    return all(len(set(machines[start : start + size])) == 1 for start in range(0, len(machines), size))


def machine_of(device: Any, devices_per_machine: int | None = None) -> int:
    """The index of the machine or slice whose fast links a device shares: the slice of a TPU, the host of a GPU.

    Args:
      device: a device of a mesh.
      devices_per_machine: as in `Layout`.
    """
    if devices_per_machine is not None:
        return device.id // devices_per_machine
    # JAX renames slice_index to partition_index.
    return getattr(device, "partition_index", None) or getattr(device, "slice_index", None) or 0


def _split_layout(layout: Layout, kept: int, extra: int) -> Layout:
    """Splits `fsdp` in three: `kept` devices stay, `extra` join `tensor`, and the rest shard rows only."""
    sizes = [layout.mesh.shape.get(axis, 1) for axis in MESH_AXES]
    if sizes[1] == kept:
        return layout
    names = ("data", "fsdp", "fsdp_to_data", "fsdp_to_tensor", "tensor")
    devices = layout.mesh.devices.reshape(sizes[0], kept, sizes[1] // (kept * extra), extra, sizes[2])
    mesh, rules = Mesh(devices, names), []
    for logical in LOGICAL_TO_MESH:
        axes = dict(layout.overrides).get(logical, LOGICAL_TO_MESH[logical])
        moved = []
        for axis in axes:
            moved += {"fsdp": ["fsdp"], "tensor": ["tensor", "fsdp_to_tensor"]}.get(axis, [axis])
            if axis == "fsdp" and "rows" in logical:
                moved += ["fsdp_to_data"]
        rules.append((logical, tuple(moved)))
    return Layout(mesh, tuple(rules), devices_per_machine=layout.devices_per_machine)


def reshard_steps(rollout: Layout) -> list[Layout]:
    """The steps in which a weight moves from one layout to the other; XLA does each with one collective.

    In a single step XLA would first gather the whole weight on every device ("involuntary full rematerialization").

    Args:
      rollout: the result of `rollout_layout`.

    Returns:
      Layouts to which the weight is constrained, one after the other; the last is `rollout`.
    """
    if "fsdp_to_data" not in rollout.mesh.axis_names:
        return [rollout]
    # First `fsdp_to_tensor` moves to the weight's other axis (all-to-all), then `fsdp_to_data` is gathered
    # (all-gather).
    between = tuple(
        (logical, tuple(part for axis in axes for part in (("fsdp", "fsdp_to_data") if axis == "fsdp" else (axis,))))
        for logical, axes in rollout.overrides
        if "rows" not in logical
    )
    return [dataclasses.replace(rollout, overrides=between), rollout]
