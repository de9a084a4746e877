"""Whether a checkpoint is intact, and whether it was synced to the disk. No model is needed to read its arrays."""

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
"""Bytes of arrays to read at a time; a single array may be larger."""
_SYNCED = "synced"
"""The name of an empty file in a checkpoint's folder, which marks it as synced."""


def checkpoint_damage(checkpoint: Path | epath.Path) -> str:
    """Reads a checkpoint, a few arrays at a time; returns what is damaged, or "" if it is intact."""
    checkpoint = epath.Path(checkpoint)
    try:
        with reading():
            arrays = read_notes(checkpoint)["arrays"]
            wrong = [name for group in _groups(arrays) for name in _wrong(checkpoint, group)]
    except DamagedError as error:
        return str(error)
    return f"wrong checksum of {', '.join(wrong[:3])}" if wrong else ""


def _groups(arrays: dict) -> Iterator[dict]:
    """Splits arrays into groups of about _AT_ONCE bytes."""
    group: dict = {}
    size = 0
    for name, (shape, dtype, written) in arrays.items():
        num_bytes = math.prod(shape) * jnp.dtype(dtype).itemsize
        if group and size + num_bytes > _AT_ONCE:
            yield group
            group, size = {}, 0
        group[name] = (shape, dtype, written)
        size += num_bytes
    if group:
        yield group


def _wrong(checkpoint: epath.Path, arrays: dict) -> list[str]:
    """The names of arrays with wrong checksums."""
    sharding = SingleDeviceSharding(_device())
    wanted = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, (shape, dtype, _) in arrays.items()}
    arguments = ocp.args.PyTreeRestore(
        item=wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
    )
    leaves = ocp.PyTreeCheckpointHandler().restore(checkpoint / "state", args=arguments)
    found = checksums(leaves)
    return [name for name, (_, _, written) in arrays.items() if found[name] != written]


def _device() -> Any:
    """The CPU, or another device if JAX_PLATFORMS excludes the CPU."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


def is_readable(checkpoint: Path | epath.Path) -> bool:
    """Whether all files of a local checkpoint can be read to the end. If not, the disk or the network has failed."""
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
    """Syncs a checkpoint to the disk, and marks it as synced. In object stores nothing is done: writes are atomic.

    Raises:
      OSError: the disk fails.
    """
    if "://" not in str(checkpoint):
        sync_tree(Path(checkpoint))
        Path(checkpoint, _SYNCED).touch()
        sync(Path(checkpoint))


def was_synced(checkpoint: Path | epath.Path) -> bool:
    """Whether a checkpoint was synced to the disk. One that was not, and is damaged, was never complete."""
    return "://" in str(checkpoint) or Path(checkpoint, _SYNCED).exists()
