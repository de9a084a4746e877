"""Where tensors are read from: a folder of safetensors files. (`gguf.py` has the other source.)

Whole tensors are read with plain reads, not through a memory map: pages of a map count against the process, and a model
would be held twice while it loads.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jax_rlhf.hub.errors import CheckpointError

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class TensorSource(Protocol):
    """Named tensors of a checkpoint, read one at a time.

    Attributes:
      shapes: of every tensor, known without reading any.
    """

    shapes: Mapping[str, tuple[int, ...]]

    def where(self, name: str) -> str:
        """The file that holds a tensor, for messages."""

    def dtype(self, name: str) -> np.dtype:
        """The dtype that `read` gives; a CheckpointError where it is not float32, float16 or bfloat16."""

    def read(self, name: str) -> np.ndarray:
        """The tensor."""

    def read_rows(self, name: str, rows: int) -> Iterator[tuple[int, np.ndarray]]:
        """The tensor in pieces of up to `rows` rows, each with the number of its first row."""


class SafetensorsSource:
    """The tensors of a checkpoint folder: `model.safetensors`, or the shards of `model.safetensors.index.json`."""

    def __init__(self, folder: Path):
        self._file: dict[str, Path] = {}
        self._dtypes: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._open: tuple[Path, safe_open] | None = None
        for file in _files(folder):
            try:
                with safe_open(file, framework="np", backend="pread") as tensors:
                    for name in tensors.keys():  # noqa: SIM118 — not a dict
                        entry = tensors.get_slice(name)
                        self._file[name] = file
                        self.shapes[name] = tuple(entry.get_shape())
                        self._dtypes[name] = entry.get_dtype()
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{file}: not a whole safetensors file ({error}); copy or download it again."
                ) from error

    def where(self, name: str) -> str:
        """The file that holds a tensor, for messages."""
        return str(self._file[name])

    def dtype(self, name: str) -> np.dtype:
        """Its dtype."""
        kind = self._dtypes[name]
        if kind not in DTYPES:
            raise CheckpointError(
                f"{self._file[name]}: tensor {name!r} is {kind}; only {', '.join(DTYPES)} are supported. Quantized "
                "checkpoints must be converted to one of these first."
            )
        return DTYPES[kind]

    def read(self, name: str) -> np.ndarray:
        """The tensor."""
        self.dtype(name)
        return self._tensors(name).get_tensor(name)

    def read_rows(self, name: str, rows: int) -> Iterator[tuple[int, np.ndarray]]:
        """The tensor in pieces of up to `rows` rows, each with the number of its first row."""
        self.dtype(name)
        count = self.shapes[name][0]
        for first in range(0, count, rows):
            # A slice by plain reads would read the whole tensor; a map opened anew forgets the pieces before.
            with safe_open(self._file[name], framework="np", backend="mmap") as tensors:
                yield first, tensors.get_slice(name)[first : min(first + rows, count)]

    def _tensors(self, name: str) -> safe_open:
        # One file stays open: tensors mostly come in file order, and opening parses the header again.
        file = self._file[name]
        if self._open is None or self._open[0] != file:
            self._open = file, safe_open(file, framework="np", backend="pread")
        return self._open[1]


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{index}: not a safetensors index ({error!r}); copy or download it again."
            ) from error
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise CheckpointError(f"{index}: names the file {name!r}, which is not in its folder.")
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name} is missing; {index.name} names it. Copy or download it.")
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    raise _nothing_to_read(folder)


def _nothing_to_read(folder: Path) -> Exception:
    pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
    if pickled:
        return CheckpointError(
            f"{folder} holds only pickled weights ({', '.join(pickled[:3])}), which can run code when loaded and are "
            "never opened here. Where you trust them, convert them once, on any machine with torch:\n"
            '  python -c "from transformers import AutoModelForCausalLM as Model, AutoTokenizer as Tokenizer; '
            f"Model.from_pretrained('{folder}').save_pretrained('converted'); "
            f"Tokenizer.from_pretrained('{folder}').save_pretrained('converted')\""
        )
    if (folder / "adapter_config.json").is_file():
        return CheckpointError(f"{folder} holds an adapter, not a model; merge it into its base model first.")
    return FileNotFoundError(f"{folder} holds no model.safetensors, model.safetensors.index.json or .gguf file.")
