"""Checksums of arrays, computed where the arrays are; equal on every mesh and kind of device.

The checksum is Σ bits[i, j, …] · a(i) · b(j) · … mod 2³². The weights a, b, … are odd hashes of the index along each
axis. So a change of one word is always detected, and an exchange of two words except with a probability of about 2⁻³².
Sums of integers do not depend on the sharding, and cost one pass over the memory.
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

_ROW = 1024  # minimum number of words per sum
_CHUNK = 65_536  # words whose products fit in the CPU cache


def checksums(leaves: dict[str, Array]) -> dict[str, int]:
    """Name → checksum of the array's bits, 0 to 2³² − 1.

    Args:
      leaves: arrays of at most 4 bytes per element. All processes must call this function with the same arrays.
    """
    if not leaves:
        return {}
    if all(device.platform == "cpu" for leaf in leaves.values() for device in leaf.sharding.device_set):
        return _on_host(leaves)
    # Offloaded arrays come to the devices one at a time, since they may not all fit there.
    offloaded = {name: leaf for name, leaf in leaves.items() if leaf.sharding.memory_kind == "pinned_host"}
    sums = dict(_on_devices({name: leaf for name, leaf in leaves.items() if name not in offloaded}))
    for name, leaf in offloaded.items():
        sums |= _on_devices({name: jax.device_put(leaf, leaf.sharding.with_memory_kind("device"))})
    return {name: int(value) for name, value in jax.device_get(sums).items()}


def _weights(xp: ModuleType, size: int, axis: int) -> Any:
    """MurmurHash3's finalizer of the index along an axis, made odd; uint32[size]."""
    index = xp.arange(size, dtype=np.uint32) + np.uint32((axis + 1) * 0x9E3779B9 % 2**32)
    mixed = (index ^ (index >> np.uint32(16))) * np.uint32(0x85EBCA6B)
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
    for axis in reversed(range(leaf.ndim)):  # a reshape would gather arrays that are sharded
        words = jnp.sum(words * _weights(jnp, leaf.shape[axis], axis), axis=axis, dtype=jnp.uint32)
    return words


def _on_host(leaves: dict[str, Array]) -> dict[str, int]:
    """Checksums on CPU with NumPy, without a copy: XLA sums integers there at a fifteenth of the memory bandwidth."""
    parts = [
        (name, shard) for name, leaf in leaves.items() for shard in leaf.addressable_shards if not shard.replica_id
    ]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        sums = pool.map(lambda part: _of_shard(leaves[part[0]].shape, part[1]), parts)
    totals = dict.fromkeys(leaves, 0)
    for (name, _), value in zip(parts, sums, strict=True):
        totals[name] += int(value)
    local = np.array([total % 2**32 for total in totals.values()], np.uint32)
    return dict(zip(totals, (int(total) % 2**32 for total in sum_over_processes(local.astype(np.uint32))), strict=True))


def _of_shard(shape: tuple[int, ...], shard: Any) -> np.uint32:
    """The part of an array's sum that one shard contributes."""
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
    """The products of the weights of several axes, flattened."""
    outer = functools.reduce(np.multiply.outer, weights, np.ones((), np.uint32))
    return np.atleast_1d(outer).reshape(-1).astype(np.uint32, copy=False)
