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
      config: the sizes.
      devices: the devices of a simulated topology; None = the available devices.

    Returns:
      The mesh, with axes "data", "fsdp", "tensor"; None if one device is available.

    Raises:
      ValueError: the product of the sizes is not the number of devices, or `data` is not a multiple of the number of
        TPU slices; the message says which sizes would do.
    """
    simulated = devices is not None
    devices = jax.devices() if devices is None else devices
    sizes = _sizes((config.data, config.fsdp, config.tensor), len(devices), "mesh")
    if len(devices) == 1 and not simulated:
        return None
    return Mesh(_arranged(sizes, devices), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def create_layout(
    config: MeshConfig,
    rollout: RolloutMeshConfig | None = None,
    devices: Sequence[Any] | None = None,
    *,
    devices_per_machine: int | None = None,
) -> Layout | None:
    """The mesh with its table of shardings and its sizes for sampling.

    Args:
      config: the mesh for training.
      rollout: the same devices for sampling.
      devices: as in `create_mesh`.
      devices_per_machine: as in `Layout`.

    Returns:
      The layout; None if one device is available.

    Raises:
      ValueError: as in `create_mesh`, or an unknown axis in `rules`.
    """
    overrides = parse_rules(config.rules)
    mesh = create_mesh(config, devices)
    if mesh is None:
        return None
    given = (None,) * 3 if rollout is None else (rollout.data, rollout.fsdp, rollout.tensor)
    if given == (None,) * 3:
        return Layout(mesh, overrides, devices_per_machine=devices_per_machine)
    wanted = tuple(1 if size is None else size for size in given)
    data, fsdp, tensor = _sizes(wanted, mesh.size, "rollout_mesh")
    extra = tensor // mesh.shape["tensor"]
    if tensor % mesh.shape["tensor"] or mesh.shape["fsdp"] % (fsdp * extra):
        choices = [n for n in range(1, mesh.shape["fsdp"] + 1) if mesh.shape["fsdp"] % n == 0]
        raise ValueError(
            f"config.rollout_mesh: data={data} × fsdp={fsdp} × tensor={tensor} cannot be reached: devices move from "
            f"the mesh's fsdp={mesh.shape['fsdp']} to tensor and data. With fsdp=1 and data=-1, tensor may be "
            f"{', '.join(str(n * mesh.shape['tensor']) for n in choices)}."
        )
    return Layout(mesh, overrides, (fsdp, extra), devices_per_machine)


def _sizes(wanted: tuple[int, ...], devices: int, where: str) -> list[int]:
    """The sizes with −1 replaced; ValueError if their product is not the number of devices."""
    sizes = list(wanted)
    fixed = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(
            f"config.{where}: data={wanted[0]}, fsdp={wanted[1]}, tensor={wanted[2]}; each must be 1 or more, and one "
            "of them may be -1, all the remaining devices."
        )
    if -1 in sizes and devices % fixed == 0:
        sizes[sizes.index(-1)] = devices // fixed
    if math.prod(sizes) != devices:
        fits = ", ".join(str(n) for n in range(1, devices + 1) if devices % n == 0)
        raise ValueError(
            f"config.{where}: data={wanted[0]} × fsdp={wanted[1]} × tensor={wanted[2]} is not the {devices} devices "
            f"that are available; sizes that divide their number: {fits}."
        )
    return sizes


def _arranged(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """Orders the devices so that neighbours along the last axes share fast links, and `data` crosses TPU slices."""
    if devices[0].platform != "tpu":  # GPUs of one machine already have consecutive ids
        return np.asarray(devices).reshape(sizes)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    if sizes[0] % slices:
        raise ValueError(
            f"config.mesh.data={sizes[0]} is not a multiple of the {slices} TPU slices. Only the data-centre network "
            f"connects slices, and only `data` may use it: set {slices} or a multiple of it."
        )
    within = (sizes[0] // slices, *sizes[1:])
    return mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices, allow_split_physical_axes=True)
