"""Checksums of arrays where they are: the same on every mesh, and on every kind of device.

Σ bits[i, j, …] · a(i) · b(j) · … mod 2³², with odd weights, a hash of the place on each axis. So a word that changes is
always seen, and words that change places are, but for a probability of about 2⁻³². Sums of integers do not depend on
how an array is cut, and a pass over the memory is all that they cost.
"""

import concurrent.futures
import functools
import os
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_rlhf.parallel import sum_over_processes

_ROW = 1024  # words that are summed at once, at least
_CHUNK = 65_536  # words whose products stay in the cache


def checksums(leaves: dict[str, Array]) -> dict[str, int]:
    """A checksum of each array's bits.

    Args:
      leaves: arrays of at most 4 bytes an element; of several processes all must call it, with the same.

    Returns:
      Name → checksum, 0 to 2³² − 1.
    """
    if not leaves:
        return {}
    if all(device.platform == "cpu" for leaf in leaves.values() for device in leaf.sharding.device_set):
        return _on_host(leaves)
    # One at a time where they wait in the host's memory, so that they need not all fit on the devices.
    waiting = {name: leaf for name, leaf in leaves.items() if leaf.sharding.memory_kind == "pinned_host"}
    sums = dict(_on_devices({name: leaf for name, leaf in leaves.items() if name not in waiting}))
    for name, leaf in waiting.items():
        sums |= _on_devices({name: jax.device_put(leaf, leaf.sharding.with_memory_kind("device"))})
    return {name: int(value) for name, value in jax.device_get(sums).items()}


def _weights(xp: ModuleType, size: int, axis: int) -> Any:
    """uint32[size], odd: MurmurHash3's finalizer of the place."""
    place = xp.arange(size, dtype=np.uint32) + np.uint32((axis + 1) * 0x9E3779B9 % 2**32)
    mixed = (place ^ (place >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return (mixed ^ (mixed >> np.uint32(16))) | np.uint32(1)


@jax.jit
def _on_devices(leaves: dict[str, Array]) -> dict[str, Array]:
    return {name: _on_device(leaf) for name, leaf in leaves.items()}


def _on_device(leaf: Array) -> Array:
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    words = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
    for axis in reversed(range(leaf.ndim)):  # no reshape, which would gather what lies on several devices
        words = jnp.sum(words * _weights(jnp, leaf.shape[axis], axis), axis=axis, dtype=jnp.uint32)
    return words


def _on_host(leaves: dict[str, Array]) -> dict[str, int]:
    """On CPU, where XLA sums integers at a fifteenth of the memory's speed, and arrays are NumPy's without a copy."""
    parts = [
        (name, shard) for name, leaf in leaves.items() for shard in leaf.addressable_shards if not shard.replica_id
    ]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda part: _of_part(leaves[part[0]].shape, part[1]), parts)
    totals = dict.fromkeys(leaves, 0)
    for (name, _), value in zip(parts, found, strict=True):
        totals[name] += int(value)
    mine = np.array([total % 2**32 for total in totals.values()], np.uint32)
    return dict(zip(totals, (int(total) % 2**32 for total in sum_over_processes(mine.astype(np.uint32))), strict=True))


def _of_part(shape: tuple[int, ...], shard: Any) -> np.uint32:
    part = np.asarray(shard.data)
    part = np.ascontiguousarray(part).view({1: np.uint8, 2: np.uint16, 4: np.uint32}[part.dtype.itemsize])
    part = part.reshape(shard.data.shape)
    weights = [
        _weights(np, size, axis)[index] for axis, (size, index) in enumerate(zip(shape, shard.index, strict=True))
    ]
    last = len(weights)
    while last > 0 and np.prod(part.shape[last:], dtype=np.int64) < _ROW:
        last -= 1
    inner, outer = _product(weights[last:]), _product(weights[:last])
    rows = part.reshape(len(outer), len(inner))
    sums = np.empty(len(rows), np.uint32)
    step = max(1, _CHUNK // max(1, len(inner)))
    for first in range(0, len(rows), step):
        piece = rows[first : first + step]
        np.sum(np.multiply(piece, inner, dtype=np.uint32), axis=1, dtype=np.uint32, out=sums[first : first + step])
    return np.sum(sums * outer, dtype=np.uint32)


def _product(weights: list[np.ndarray]) -> np.ndarray:
    """The weights of axes in one."""
    outer = functools.reduce(np.multiply.outer, weights, np.ones((), np.uint32))
    return np.atleast_1d(outer).reshape(-1).astype(np.uint32, copy=False)
