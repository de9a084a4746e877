"""Writes parameters to the weight files of a checkpoint folder; tensors are gathered one at a time."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from jax_rlhf.hub.families import hub_tensors
from jax_rlhf.hub.hub_tensor import HubTensor
from jax_rlhf.io.durable import file_errors
from jax_rlhf.models import Decoder
from jax_rlhf.parallel import gather_to_host

MAX_SHARD_BYTES = 5_000_000_000


@dataclasses.dataclass(frozen=True)
class _Entry:
    name: str
    tensor: HubTensor
    layer: int | None
    dtype: np.dtype

    @property
    def bytes(self) -> int:
        return int(np.prod(self.tensor.hub_shape)) * self.dtype.itemsize


def weight_files(
    model: Decoder, params: dict, dtypes: dict, max_shard_bytes: int
) -> tuple[list[list[_Entry]], dict | None]:
    """Assigns tensors to weight files.

    Args:
      model: the model.
      params: its parameters.
      dtypes: the dtype in which each parameter is written, a tree like `params`.
      max_shard_bytes: the largest size of a file, in bytes; a file with a single tensor may be larger.

    Returns:
      (entries of each file, content of the index file); the index is None if there is one file.
    """
    files: list[list[_Entry]] = [[]]
    entries = _entries(model, dtypes)
    for entry in entries:
        if files[-1] and sum(other.bytes for other in files[-1]) + entry.bytes > max_shard_bytes:
            files.append([])
        files[-1].append(entry)
    if len(files) == 1:
        return files, None
    weight_map = {entry.name: file_name(i, len(files)) for i, file in enumerate(files) for entry in file}
    return files, {"metadata": {"total_size": sum(entry.bytes for entry in entries)}, "weight_map": weight_map}


def file_name(index: int, count: int) -> str:
    """The name of the `index`-th of `count` weight files, as in transformers."""
    return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def write_weights(folder: Path | None, params: dict, files: list[list[_Entry]], index: dict | None) -> None:
    """Gathers and writes the tensors; with several processes all must call it.

    A process that cannot write still gathers all tensors before it raises, because the others would hang in the
    collectives otherwise.

    Args:
      folder: the folder to write to; None on processes that only take part in gathering.
      params: the parameters.
      files, index: from `weight_files`.

    Raises:
      OSError: the disk is full, …
    """
    failure = None
    for number, entries in enumerate(files):
        content = {}
        for entry, array in _gathered(params, entries):
            if folder is not None and failure is None:
                content[entry.name] = array
        if folder is None or not content:
            continue
        file = folder / file_name(number, len(files))
        try:
            with file_errors(file):
                save_file(content, file, metadata={"format": "pt"})
        except Exception as error:  # of any type: gathering must continue for the other processes
            failure = error
    if failure is not None:
        raise failure
    if folder is not None and index is not None:
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _gathered(params: dict, entries: list[_Entry]) -> Iterator[tuple[_Entry, np.ndarray]]:
    for entry in entries:
        parts = [gather_to_host(_leaf(params, path), entry.layer, entry.dtype) for path in entry.tensor.leaves]
        if entry.tensor.kind == "same":  # drops rows that pad the vocabulary
            parts = [part[: entry.tensor.hub_shape[0]] for part in parts]
        yield entry, entry.tensor.join(parts)


def _entries(model: Decoder, dtypes: dict) -> list[_Entry]:
    entries = []
    for tensor in hub_tensors(model):
        dtype = np.dtype(jnp.result_type(*{_leaf(dtypes, path) for path in tensor.leaves}))
        layers = range(model.config.num_layers) if tensor.stacked else [None]
        entries += [_Entry(tensor.name.format(layer), tensor, layer, dtype) for layer in layers]
    return entries


def _leaf(params: dict, path: tuple[str, ...]) -> Any:
    for key in path:
        params = params[key]
    return params
