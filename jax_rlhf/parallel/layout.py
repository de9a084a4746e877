"""Which axis of an array lies along which axes of the mesh: one table, for parameters, activations and caches alike.

| logical axis | of | mesh axes |
|---|---|---|
| vocab | embedding table, LM head, logits | tensor |
| heads, kv_heads | attention's projections, queries, keys, values, caches | tensor |
| mlp | the width inside the MLP | tensor |
| embed | the residual stream's side of weights | fsdp |
| rows | rows of a batch | data, fsdp |
| drawn_rows | rows whose next tokens are drawn, the whole vocabulary each | data, fsdp, tensor |
| hidden | the residual stream itself | — |
| head_dim, norm, layers, length | — | — |

So a weight is cut along `fsdp` on one side and along `tensor` on the other; XLA gathers the first before use, a layer
at a time, and sums over the second after. `config.mesh.rules` overrides lines: `("mlp=tensor+fsdp", "embed=")`.

A mesh may lack any of the axes; what would lie along a missing one is replicated.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import overload

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
    """A mesh and the table: hashable, a static part of every model that runs on it.

    Attributes:
      mesh: the devices; its axes count as Auto whatever type they have.
      overrides: lines of the table that differ, (logical axis, mesh axes) each.
      rollout: for sampling, how many of the devices along `fsdp` still cut weights there, and how many join `tensor`;
        None = chosen by the model (`rollout_layout`).
      near: so many devices of consecutive ids are joined by fast links, the GPUs of a machine; None = as the devices
        themselves say, which those of a topology that is only described do not.
    """

    mesh: Mesh
    overrides: tuple[tuple[str, tuple[str, ...]], ...] = ()
    rollout: tuple[int, int] | None = None
    near: int | None = None

    def __post_init__(self) -> None:
        # `jax.make_mesh` makes Explicit axes by default, under which a contraction over a sharded axis is an error.
        auto = (AxisType.Auto,) * len(self.mesh.axis_names)
        object.__setattr__(self, "mesh", Mesh(self.mesh.devices, self.mesh.axis_names, axis_types=auto))

    @property
    def platform(self) -> str:
        """What its devices are: "cpu", "gpu" or "tpu"."""
        platform = self.mesh.devices.flat[0].platform
        return platform if platform in ("cpu", "tpu") else "gpu"

    def mesh_axes(self, logical: str | None) -> tuple[str, ...]:
        """The mesh axes of a logical one, those that the mesh has."""
        if logical is None:
            return ()
        axes = dict(self.overrides).get(logical, LOGICAL_TO_MESH[logical])
        return tuple(axis for axis in axes if axis in self.mesh.axis_names)

    def cuts(self, logical: str | None) -> int:
        """Into how many parts a logical axis is cut."""
        return math.prod(self.mesh.shape[axis] for axis in self.mesh_axes(logical))

    def spec(self, axes: Sequence[str | None], shape: Sequence[int] | None = None) -> PartitionSpec:
        """Where an array goes.

        Args:
          axes: logical names of its axes.
          shape: its sizes; one that its mesh axes do not divide is cut by as many of the first as do. None = all do.

        Returns:
          The mesh axes of each axis; none twice, the first logical axis has it.
        """
        used: set[str] = set()
        parts = []
        for index, logical in enumerate(axes):
            names = tuple(name for name in self.mesh_axes(logical) if name not in used)
            while shape is not None and shape[index] % math.prod(self.mesh.shape[name] for name in names):
                names = names[:-1]
            used.update(names)
            parts.append(names[0] if len(names) == 1 else names or None)
        while parts and parts[-1] is None:  # as jit returns them: it takes another form for another sharding
            parts.pop()
        return PartitionSpec(*parts)

    def sharding(self, axes: Sequence[str | None], shape: Sequence[int] | None = None) -> NamedSharding:
        """`spec` on this mesh."""
        return NamedSharding(self.mesh, self.spec(axes, shape))


@overload
def as_layout(mesh: Mesh | Layout) -> Layout: ...
@overload
def as_layout(mesh: None) -> None: ...
@overload
def as_layout(mesh: Mesh | Layout | None) -> Layout | None: ...
def as_layout(mesh: Mesh | Layout | None) -> Layout | None:
    """What public functions are given as `mesh`.

    Args:
      mesh: a mesh, which goes by the table as it is; a layout; or None for one device.

    Returns:
      A layout, or None.
    """
    return mesh if mesh is None or isinstance(mesh, Layout) else Layout(mesh)


def parse_rules(rules: Iterable[str]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Lines of the table from a config.

    Args:
      rules: "logical=mesh+mesh" each; nothing after the = for whole.

    Returns:
      `Layout.overrides`.

    Raises:
      ValueError: an axis that there is not; lists those that there are.
    """
    parsed = []
    for rule in rules:
        logical, equals, axes = rule.partition("=")
        names = tuple(name.strip() for name in axes.split("+") if name.strip())
        if not equals or logical.strip() not in LOGICAL_TO_MESH or not set(names) <= set(MESH_AXES):
            raise ValueError(
                f'config.mesh.rules: {rule!r}; "logical=mesh+mesh" is expected, logical one of '
                f"{', '.join(LOGICAL_TO_MESH)}, mesh of {', '.join(MESH_AXES)}."
            )
        parsed.append((logical.strip(), names))
    return tuple(parsed)


def constrained(x: Array, layout: Layout | None, *axes: str | None) -> Array:
    """Holds an array where the table puts it, under jit; XLA would else choose by what is cheap nearby.

    Args:
      x: any array.
      layout: the layout; None = one device, and x is returned as it is.
      axes: logical names of its axes.

    Returns:
      x.
    """
    return x if layout is None else jax.lax.with_sharding_constraint(x, layout.sharding(axes, x.shape))


def lookup_layout(layout: Layout | None) -> Layout | None:
    """The layout in which rows of a table are looked up: a batch is not cut along the axes that cut the table.

    Args:
      layout: the model's; None = one device.

    Returns:
      A layout on the same mesh, or None.
    """
    if layout is None:
        return None
    of_table = {*layout.mesh_axes("vocab"), *layout.mesh_axes("embed")}
    rows = tuple(axis for axis in layout.mesh_axes("rows") if axis not in of_table)
    others = tuple(line for line in layout.overrides if line[0] != "rows")
    return dataclasses.replace(layout, overrides=(*others, ("rows", rows)))


def rollout_layout(layout: Layout, divided: Sequence[int]) -> Layout:
    """The layout to sample in: no weight is cut where decoding would have to gather it for every token.

    As configured (`config.rollout_mesh`), or: of the devices along `fsdp` as many as the model's sizes allow, and fast
    links join, go to `tensor`, the rest to `data`. With 8 key/value heads and fsdp=8 that is tensor=8: as much memory
    per device as before. Each token costs two sums over `tensor` per layer, so it does not leave a machine of GPUs.

    Args:
      layout: that of training.
      divided: sizes that `tensor` must divide: key/value heads, heads, MLP width. (A vocabulary that it does not divide
        is cut as far as it goes.)

    Returns:
      A layout on the same devices in the same order; `reshard_steps` leads there.

    Raises:
      ValueError: the sizes that are configured do not divide the model's; says which would.

    Source: the idea is DeepSpeed-Chat's Hybrid Engine (Yao et al. 2023).
    """
    fsdp, tensor = (layout.mesh.shape.get(axis, 1) for axis in ("fsdp", "tensor"))
    fits = [n for n in range(1, fsdp + 1) if fsdp % n == 0 and not any(size % (n * tensor) for size in divided)]
    if layout.rollout is None:
        return _split_layout(layout, 1, max((n for n in fits if _joined(layout, n * tensor)), default=1))
    kept, extra = layout.rollout
    if extra not in fits and extra > 1:
        raise ValueError(
            f"config.rollout_mesh.tensor={extra * tensor} does not divide key/value heads, heads and MLP width of "
            f"{', '.join(map(str, divided))}; {', '.join(str(n * tensor) for n in fits)} would."
        )
    return _split_layout(layout, kept, extra)


def tensor_is_joined(layout: Layout) -> bool:
    """Whether fast links join the devices that share a weight along `tensor`.

    Args:
      layout: of training or of sampling.

    Returns:
      False where its sums go over the network.
    """
    return _joined(layout, math.prod(layout.mesh.shape.get(axis, 1) for axis in ("fsdp_to_tensor", "tensor")))


def _joined(layout: Layout, size: int) -> bool:
    """Whether each `size` devices that follow each other in the mesh lie in one machine or slice."""
    machines = [machine_of(device, layout.near) for device in layout.mesh.devices.flat]
    return all(len(set(machines[start : start + size])) == 1 for start in range(0, len(machines), size))


def machine_of(device: jax.Device, near: int | None = None) -> int:  # pyright: ignore[reportInvalidTypeForm] -- jax.Device is a class
    """Which machine or slice a device lies in, within which fast links join all.

    Args:
      device: of a mesh.
      near: as in `Layout`.

    Returns:
      Its number: of TPUs that of the slice, of GPUs that of the host.
    """
    if near is not None:
        return device.id // near
    return getattr(device, "partition_index", None) or getattr(device, "slice_index", None) or 0  # JAX renames it


def _split_layout(layout: Layout, kept: int, extra: int) -> Layout:
    """`fsdp` in three: what stays, what becomes rows alone, and what joins `tensor`."""
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
    return Layout(mesh, tuple(rules), near=layout.near)


def reshard_steps(layout: Layout, rollout: Layout) -> list[Layout]:
    """The ways of a weight from one layout to the other, each of which XLA does with one collective.

    In one step it would put together the whole weight on every device first ("involuntary full rematerialization").

    Args:
      layout: that of training.
      rollout: what `rollout_layout` says.

    Returns:
      Layouts to hold the weight to, one after the other; the last is `rollout`.
    """
    if "fsdp_to_data" not in rollout.mesh.axis_names:
        return [rollout]
    # First what joins `tensor` changes sides (all-to-all), then what becomes rows is put together (all-gather).
    between = tuple(
        (logical, tuple(part for axis in axes for part in (("fsdp", "fsdp_to_data") if axis == "fsdp" else (axis,))))
        for logical, axes in rollout.overrides
        if "rows" not in logical
    )
    return [dataclasses.replace(rollout, overrides=between), rollout]
