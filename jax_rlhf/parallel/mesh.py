"""The mesh of devices."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from jax_rlhf.parallel.config import MeshConfig, RolloutMeshConfig
from jax_rlhf.parallel.layout import MESH_AXES, Layout, parse_rules


def create_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh | None:
    """The mesh of all devices of all processes.

    Args:
      config: its fields.
      devices: those of a topology that is only described; None = those that there are.

    Returns:
      The mesh, axes "data", "fsdp", "tensor"; None where there is one device.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or `data` is no multiple of the TPU slices; says
        what would be.
    """
    described = devices is not None
    devices = jax.devices() if devices is None else devices
    sizes = _sizes((config.data, config.fsdp, config.tensor), len(devices), "mesh")
    if len(devices) == 1 and not described:
        return None
    return Mesh(_arranged(sizes, devices), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def create_layout(
    config: MeshConfig,
    rollout: RolloutMeshConfig | None = None,
    devices: Sequence[Any] | None = None,
    *,
    near: int | None = None,
) -> Layout | None:
    """The mesh with its table, and the form in which it samples.

    Args:
      config: the mesh.
      rollout: the same devices for sampling.
      devices: as in `create_mesh`.
      near: as in `Layout`.

    Returns:
      The layout; None where there is one device.

    Raises:
      ValueError: as in `create_mesh`, or an unknown axis in `rules`.
    """
    overrides = parse_rules(config.rules)
    mesh = create_mesh(config, devices)
    if mesh is None:
        return None
    given = (None,) * 3 if rollout is None else (rollout.data, rollout.fsdp, rollout.tensor)
    if given == (None,) * 3:
        return Layout(mesh, overrides, near=near)
    wanted = tuple(1 if size is None else size for size in given)
    data, fsdp, tensor = _sizes(wanted, mesh.size, "rollout_mesh")
    extra = tensor // mesh.shape["tensor"]
    if tensor % mesh.shape["tensor"] or mesh.shape["fsdp"] % (fsdp * extra):
        choices = [n for n in range(1, mesh.shape["fsdp"] + 1) if mesh.shape["fsdp"] % n == 0]
        raise ValueError(
            f"config.rollout_mesh: data={data} × fsdp={fsdp} × tensor={tensor}; devices go from the mesh's fsdp="
            f"{mesh.shape['fsdp']} to tensor and data: with fsdp=1 and data=-1, tensor may be "
            f"{', '.join(str(n * mesh.shape['tensor']) for n in choices)}."
        )
    return Layout(mesh, overrides, (fsdp, extra), near)


def _sizes(wanted: tuple[int, ...], devices: int, where: str) -> list[int]:
    sizes = list(wanted)
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(
            f"config.{where}: data={wanted[0]}, fsdp={wanted[1]}, tensor={wanted[2]}; each is 1 or "
            "more, and one of them may be -1, the rest."
        )
    if -1 in sizes and devices % known == 0:
        sizes[sizes.index(-1)] = devices // known
    if math.prod(sizes) != devices:
        fits = ", ".join(str(n) for n in range(1, devices + 1) if devices % n == 0)
        raise ValueError(
            f"config.{where}: data={wanted[0]} × fsdp={wanted[1]} × tensor={wanted[2]} is not the "
            f"{devices} devices that there are; sizes that divide them: {fits}."
        )
    return sizes


def _arranged(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """Devices so that neighbours along the last axes are neighbours in the machine, and `data` lies over the slices."""
    if devices[0].platform != "tpu":  # of GPUs, those of a machine follow each other
        return np.asarray(devices).reshape(sizes)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    if sizes[0] % slices:
        raise ValueError(
            f"config.mesh.data={sizes[0]} is no multiple of the {slices} TPU slices: between slices there is only the "
            f"data-centre network, over which `data` alone goes; take {slices} or a multiple of it."
        )
    within = (sizes[0] // slices, *sizes[1:])
    return mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices, allow_split_physical_axes=True)
