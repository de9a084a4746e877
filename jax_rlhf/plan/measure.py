"""Measures the memory of a plan's programs on the available devices: each program is run once, on zeros."""

import collections
import dataclasses
import math
from typing import Any, cast

import jax
import jax.numpy as jnp

from jax_rlhf.parallel import machine_of
from jax_rlhf.plan.abstract import Program
from jax_rlhf.plan.chips import CARDS, CHIPS, Chip
from jax_rlhf.plan.topology import Topology

_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
} | {card.name: kind for kind, card in CARDS.items()}


def topology_here() -> Topology:
    """The devices of this machine, or of this job, as a topology. Without a data sheet, times are NaN.

    Raises:
      ValueError: the devices do not report their memory, such as CPUs.
    """
    devices = tuple(jax.devices())
    stats = jax.local_devices()[0].memory_stats()
    if not stats or "bytes_limit" not in stats:
        raise ValueError(
            f"--measure: {devices[0].device_kind} devices do not report their memory; use --measure on GPUs or TPUs."
        )
    kind = devices[0].device_kind
    unknown = Chip(kind, 0.0, *cast(tuple[Any, ...], (math.nan,) * 8))
    chip = dataclasses.replace(chip_of(kind) or unknown, memory=float(stats["bytes_limit"]))
    group = min(collections.Counter(map(machine_of, devices)).values())
    return Topology("here", chip, devices, group, chip.link)


def chip_of(device_kind: str) -> Chip | None:
    """The data sheet of a device by `jax.Device.device_kind`; None if it is unknown."""
    return CHIPS.get(_KINDS.get(device_kind, ""))


def measured_peak(program: Program) -> float:
    """Runs a program on zeros, and returns the peak memory of this process's devices in bytes.

    The peak counts from the start of the process. So run programs in the order of their planned peaks, the smallest
    first.

    Args:
      program: a program for the available devices.
    """
    made: dict[int, Any] = {}  # id of a shape → array: a shape that occurs several times becomes one array

    def make(leaf: Any) -> Any:
        if not _is_shape(leaf):
            return leaf
        if id(leaf) not in made:
            made[id(leaf)] = _zeros(leaf)
        return made[id(leaf)]

    resident, arguments = jax.tree.map(make, (program.resident, program.arguments), is_leaf=_is_shape)
    jax.block_until_ready(program.function(*arguments))
    del resident
    return float(max(device.memory_stats()["peak_bytes_in_use"] for device in jax.local_devices()))


def _is_shape(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def _zeros(leaf: jax.ShapeDtypeStruct) -> Any:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.device_put(jax.random.key(0), leaf.sharding)
    return jax.jit(lambda: jnp.zeros(leaf.shape, leaf.dtype), out_shardings=leaf.sharding)()
