"""Converts between a tensor of a checkpoint and parameters of the decoder.

A checkpoint's tensor contains one parameter, or several that are fused along their outputs:

| kind     | in the checkpoint           | in the decoder                                           |
|----------|-----------------------------|----------------------------------------------------------|
| same     | [...]                       | [...]: embeddings, norms                                 |
| linear   | [outputs, inputs]           | [*inputs, *outputs]: PyTorch's `nn.Linear`               |
| conv1d   | [inputs, outputs]           | [*inputs, *outputs]: GPT-2's                             |
| bias     | [outputs]                   | [*outputs]                                               |

Fused parameters are concatenated (Phi-3, GPT-2), or interleaved head by head (GPT-NeoX). `split` returns views, so that
reading a checkpoint copies each number only once, to its destination.
"""

import dataclasses
import math
from typing import Literal

import numpy as np

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubTensor:
    """One tensor of a checkpoint, or one per layer.

    Attributes:
      name: the name in the checkpoint, with "{}" for the layer index if there is one per layer.
      leaves: paths of the parameters that it contains, e.g. ("layers", "attention", "query", "kernel").
      shapes: shapes of these parameters, without the layer axis and without rows that pad the vocabulary.
      kind: see the module's docstring.
      inputs: the number of leading axes of each shape that are inputs (linear, conv1d).
      interleaved: the parameters are fused head by head.
      stacked: the checkpoint has one tensor per layer, and the parameter has a leading layer axis.
    """

    name: str
    leaves: tuple[tuple[str, ...], ...]
    shapes: tuple[Shape, ...]
    kind: Literal["same", "linear", "conv1d", "bias"]
    inputs: int = 1
    interleaved: bool = False
    stacked: bool = False

    @property
    def hub_shape(self) -> Shape:
        """The tensor's shape in the checkpoint."""
        if self.kind == "same":
            return self.shapes[0]
        sizes = [math.prod(shape[self._first_output :]) for shape in self.shapes]
        outputs, width = sum(sizes), math.prod(self.shapes[0][: self._first_output])
        return {"linear": (outputs, width), "conv1d": (width, outputs), "bias": (outputs,)}[self.kind]

    def split(self, array: np.ndarray) -> list[np.ndarray]:
        """Splits the checkpoint's tensor [hub_shape] into one view per leaf, with the shapes `shapes`."""
        if self.kind == "same":
            return [array]
        if self.interleaved:
            heads, width = self.shapes[0][self._first_output :]
            # [heads · n · width, ...] → n of [heads, width, ...]
            parts = np.moveaxis(array.reshape(heads, len(self.leaves), width, *array.shape[1:]), 1, 0)
        else:
            sizes = [math.prod(shape[self._first_output :]) for shape in self.shapes]
            parts = np.split(array, np.cumsum(sizes)[:-1], axis=self._output_axis)
        return [self._to_leaf(part, shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def join(self, parts: list[np.ndarray]) -> np.ndarray:
        """Joins parameters to the checkpoint's tensor [hub_shape], contiguous: the inverse of `split`."""
        if self.kind == "same":
            return np.ascontiguousarray(parts[0])
        outer = [self._from_leaf(part) for part in parts]  # [outputs..., inputs...] or conv1d's [inputs, outputs]
        if self.interleaved:
            joined = np.stack(outer, axis=1)
        else:
            joined = np.concatenate([part.reshape(self._flat_shape(part.size)) for part in outer], self._output_axis)
        return np.ascontiguousarray(joined.reshape(self.hub_shape))

    @property
    def _first_output(self) -> int:
        return 0 if self.kind == "bias" else self.inputs

    @property
    def _output_axis(self) -> int:
        return 1 if self.kind == "conv1d" else 0

    def _flat_shape(self, size: int) -> Shape:
        width = math.prod(self.shapes[0][: self._first_output])
        return {"linear": (size // width, width), "conv1d": (width, size // width), "bias": (size,)}[self.kind]

    def _to_leaf(self, part: np.ndarray, shape: Shape) -> np.ndarray:
        if self.kind != "linear":
            return part.reshape(shape)
        outputs = shape[self.inputs :]
        part = part.reshape(*outputs, *shape[: self.inputs])
        return part.transpose(*range(len(outputs), len(shape)), *range(len(outputs)))

    def _from_leaf(self, part: np.ndarray) -> np.ndarray:
        if self.kind != "linear":
            return part
        return part.transpose(*range(self.inputs, part.ndim), *range(self.inputs))
