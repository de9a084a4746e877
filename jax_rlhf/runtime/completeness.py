"""Whether a checkpoint is whole, and whether it was on the disk; arrays are read without a model to put them into."""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import SingleDeviceSharding

from jax_rlhf.io.durable import sync, sync_tree
from jax_rlhf.runtime.checksum import checksums
from jax_rlhf.runtime.notes import DamagedError, read_notes, reading

_AT_ONCE = 2**30
"""Bytes of arrays that are read together; one array may be larger."""
_SYNCED = "synced"
"""An empty file in a checkpoint's folder."""


def of_checkpoint(checkpoint: Path | epath.Path) -> str:
    """Reads a checkpoint, some of its arrays at a time.

    Args:
      checkpoint: its folder.

    Returns:
      "" where it is whole, else what is wrong.
    """
    checkpoint = epath.Path(checkpoint)
    try:
        with reading():
            arrays = read_notes(checkpoint)["arrays"]
            wrong = [name for group in _groups(arrays) for name in _wrong(checkpoint, group)]
    except DamagedError as error:
        return str(error)
    return f"{', '.join(wrong[:3])}: another checksum than when it was written" if wrong else ""


def _groups(arrays: dict) -> Iterator[dict]:
    group: dict = {}
    size = 0
    for name, (shape, dtype, written) in arrays.items():
        bytes_of_it = math.prod(shape) * jnp.dtype(dtype).itemsize
        if group and size + bytes_of_it > _AT_ONCE:
            yield group
            group, size = {}, 0
        group[name] = (shape, dtype, written)
        size += bytes_of_it
    if group:
        yield group


def _wrong(checkpoint: epath.Path, arrays: dict) -> list[str]:
    place = SingleDeviceSharding(_device())
    wanted = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=place) for name, (shape, dtype, _) in arrays.items()}
    how = {"restore_args": ocp.checkpoint_utils.construct_restore_args(wanted), "partial_restore": True}
    leaves = ocp.PyTreeCheckpointHandler().restore(
        checkpoint / "state", args=ocp.args.PyTreeRestore(item=wanted, **how)
    )
    found = checksums(leaves)
    return [name for name, (_, _, written) in arrays.items() if found[name] != written]


def _device() -> Any:
    """The host's memory; where JAX_PLATFORMS leaves the CPU out, a device's."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


def can_be_read(checkpoint: Path | epath.Path) -> bool:
    """Whether each file of a checkpoint can be read to its end, whatever stands there.

    Args:
      checkpoint: its local folder.

    Returns:
      Whether; where not, the disk or the network fails, and its content is not known.
    """
    try:
        for parent, _, names in os.walk(checkpoint, onerror=_raise):
            for name in names:
                with open(os.path.join(parent, name), "rb") as file:
                    while file.read(2**24):
                        pass
    except OSError:
        return False
    return True


def _raise(error: OSError) -> None:
    raise error


def mark_synced(checkpoint: Path | epath.Path) -> None:
    """Waits until a checkpoint is on the disk, and notes that it is. Object stores have whole objects as it is.

    Args:
      checkpoint: its folder.

    Raises:
      OSError: the disk fails.
    """
    if "://" not in str(checkpoint):
        sync_tree(Path(checkpoint))
        Path(checkpoint, _SYNCED).touch()
        sync(Path(checkpoint))


def was_synced(checkpoint: Path | epath.Path) -> bool:
    """Whether a checkpoint was on the disk once: one that was not, and cannot be read, was never complete.

    Args:
      checkpoint: its folder.

    Returns:
      Whether.
    """
    return "://" in str(checkpoint) or Path(checkpoint, _SYNCED).exists()
