"""The mesh of devices."""

import dataclasses
import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices lie along each axis; −1, once, means the rest.

    Attributes:
      data: copies of everything, each with its own rows.
      fsdp: rows, and parameters cut along their width.
      tensor: heads, MLP width and vocabulary.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1


def create_mesh(config: MeshConfig) -> Mesh | None:
    """The mesh of all devices of all processes.

    Args:
      config: its fields.

    Returns:
      The mesh, axes "data", "fsdp", "tensor"; None where there is one device.

    Raises:
      ValueError: the sizes do not multiply to the number of devices; says what would.
    """
    sizes = [config.data, config.fsdp, config.tensor]
    devices = jax.device_count()
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(
            f"config.mesh: data={config.data}, fsdp={config.fsdp}, tensor={config.tensor}; each is 1 or "
            "more, and one of them may be -1, the rest."
        )
    if -1 in sizes and devices % known == 0:
        sizes[sizes.index(-1)] = devices // known
    if math.prod(sizes) != devices:
        fits = ", ".join(str(n) for n in range(1, devices + 1) if devices % n == 0)
        raise ValueError(
            f"config.mesh: data={config.data} × fsdp={config.fsdp} × tensor={config.tensor} is not the "
            f"{devices} devices that there are; sizes that divide them: {fits}."
        )
    if devices == 1:
        return None
    return Mesh(np.asarray(jax.devices()).reshape(sizes), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
