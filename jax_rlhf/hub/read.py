"""Reads the tensors of a checkpoint into sharded parameters, one tensor at a time.

The host's memory never contains more than the parameters read so far, the layers of one parameter, and one tensor. On
CPU it needs even less: device arrays take over the buffers into which the tensors are read.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Sharding

from jax_rlhf.hub.checkpoint_error import CheckpointError
from jax_rlhf.hub.hub_tensor import HubTensor
from jax_rlhf.hub.safetensors_source import TensorSource
from jax_rlhf.hub.scalar_head import HEAD_TENSORS

Path = tuple[str, ...]
Shard = tuple[slice, ...]

_ALIGNMENT = 64  # bytes; XLA's CPU backend takes over NumPy buffers with this alignment without a copy
_PIECE = 16 * 2**20  # bytes of an embedding table that are read at a time


def check_tensors(source: TensorSource, tensors: list[HubTensor], num_layers: int, ignore: Any) -> None:
    """Checks names, shapes and dtypes of a checkpoint's tensors, before any tensor is read.

    Args:
      source: the checkpoint.
      tensors: the tensors that the model needs, with the source's names.
      num_layers: L.
      ignore: a compiled pattern of names of other tensors that a checkpoint may have.

    Raises:
      CheckpointError: a tensor is missing, has a wrong shape or dtype, or is unknown.
    """
    if num_layers > len(source.shapes):  # before all names are listed: a config.json may claim any number
        raise CheckpointError(
            f"config.json asks for {num_layers} layers, but the checkpoint has only {len(source.shapes)} tensors. The "
            "file is incomplete, or its config.json describes another model."
        )
    wanted = {name: tensor for tensor in tensors for name in _names(tensor, num_layers)}
    present = set(source.shapes)
    if missing := [name for name in wanted if name not in present]:
        files = sorted({source.where(name) for name in present}) or ["the checkpoint"]
        raise CheckpointError(
            f"{_some(files)}: {len(missing)} tensors are missing: {_some(missing)}. The file is incomplete, or its "
            "config.json describes another model."
        )
    for name, tensor in wanted.items():
        if source.shapes[name] != tensor.hub_shape:
            raise CheckpointError(
                f"{source.where(name)}: tensor {name!r} has shape {list(source.shapes[name])}, but config.json asks "
                f"for {list(tensor.hub_shape)}{_shape_hint(name)}."
            )
        source.dtype(name)
    if extra := sorted(name for name in present - wanted.keys() if not ignore.search(name)):
        raise CheckpointError(
            f"{source.where(extra[0])}: {len(extra)} tensors are not part of the model that config.json describes: "
            f"{_some(extra)}. Correct config.json, or remove them from the file."
        )


def _shape_hint(name: str) -> str:
    if HEAD_TENSORS.match(name):
        return " (a scalar head must have one label: num_labels = 1, and a weight of shape [1, width])"
    return ""


def _some(names: list[str]) -> str:
    return ", ".join(map(str, names[:5])) + (", …" if len(names) > 5 else "")


def _names(tensor: HubTensor, num_layers: int) -> list[str]:
    return [tensor.name.format(layer) for layer in range(num_layers)] if tensor.stacked else [tensor.name]


def read_params(
    source: TensorSource,
    tensors: list[HubTensor],
    shapes: dict[Path, tuple[int, ...]],
    shardings: dict[Path, Sharding],
    dtype: np.dtype | None,
    num_layers: int,
) -> dict[Path, Array]:
    """Reads tensors directly into (possibly sharded) parameters.

    Args:
      source: the checkpoint, checked by `check_tensors`.
      tensors: the tensors to read.
      shapes: the shape of each parameter, with layer axis and vocabulary padding.
      shardings: the sharding of each parameter.
      dtype: of the parameters; None = as stored (the widest if layers differ).
      num_layers: L.

    Returns:
      Parameter path → array.
    """
    params = {}
    for tensor in tensors:
        names = _names(tensor, num_layers)
        target = dtype or jnp.result_type(*{source.dtype(name) for name in names})
        buffers = {leaf: _buffers(shapes[leaf], shardings[leaf], target) for leaf in tensor.leaves}
        for layer, name in enumerate(names):
            for first, pieces in _pieces(source, tensor, name):
                for leaf, piece in zip(tensor.leaves, pieces, strict=True):
                    _fill(buffers[leaf], (layer, *piece.shape) if tensor.stacked else None, first, piece)
        for leaf in tensor.leaves:
            params[leaf] = _to_devices(buffers.pop(leaf), shapes[leaf], shardings[leaf])
    return params


def _pieces(source: TensorSource, tensor: HubTensor, name: str) -> Iterator[tuple[int, list[np.ndarray]]]:
    shape = tensor.hub_shape
    if tensor.kind != "same" or len(shape) < 2:
        yield 0, tensor.split(source.read(name))
        return
    row = math.prod(shape[1:]) * 4
    for first, piece in source.read_rows(name, max(1, _PIECE // row)):
        yield first, [piece]


def _buffers(shape: tuple[int, ...], sharding: Sharding, dtype: np.dtype) -> list[tuple[Shard, np.ndarray, list[Any]]]:
    """(slices, zeroed host buffer, devices) of each distinct shard on this process's devices."""
    shards: dict[tuple, tuple[Shard, list[Any]]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None, "a device that is addressed has a part"
        index = tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True))
        key = tuple((part.start, part.stop) for part in index)
        shards.setdefault(key, (index, []))[1].append(device)
    return [
        (index, _aligned_zeros(tuple(part.stop - part.start for part in index), dtype), devices)
        for index, devices in shards.values()
    ]


def _aligned_zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _fill(buffers: list, layer: tuple[int, ...] | None, first: int, piece: np.ndarray) -> None:
    for index, buffer, _ in buffers:
        if layer is not None:
            if index[0].start <= layer[0] < index[0].stop:
                buffer[layer[0] - index[0].start] = piece[index[1:]]
            continue
        # Copy the rows of this piece that belong to this shard.
        start, stop = max(index[0].start, first), min(index[0].stop, first + piece.shape[0])
        if start < stop:
            rows = piece[(slice(start - first, stop - first), *index[1:])]
            buffer[start - index[0].start : stop - index[0].start] = rows


def _to_devices(buffers: list, shape: tuple[int, ...], sharding: Sharding) -> Array:
    arrays = [jax.device_put(buffer, device) for _, buffer, devices in buffers for device in devices]
    result = jax.make_array_from_single_device_arrays(shape, sharding, arrays)
    return jax.block_until_ready(result)  # host buffers may be freed only after a device has copied them
