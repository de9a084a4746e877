"""Reads tensors from a folder of safetensors files. (`gguf.py` reads them from a GGUF file.)

Whole tensors are read with plain reads, not through a memory map: pages of a map count as memory of the process, which
would need twice the memory of the model while loading.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jax_rlhf.hub.checkpoint_error import CheckpointError
from jax_rlhf.io.json_files import JSONFileError, read_object
from jax_rlhf.io.paths import is_name, local_path

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}

ADAPTER = "adapter_config.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class TensorSource(Protocol):
    """Named tensors of a checkpoint, read one at a time.

    Attributes:
      shapes: the shape of every tensor, available without reading any.
    """

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...  # noqa: D102

    def where(self, name: str) -> str:
        """The file of a tensor, for error messages."""
        ...

    def dtype(self, name: str) -> np.dtype:
        """The dtype of `read`'s result; CheckpointError if it is not float32, float16 or bfloat16."""
        ...

    def read(self, name: str) -> np.ndarray:
        """The tensor."""
        ...

    def read_rows(self, name: str, rows: int) -> Iterator[tuple[int, np.ndarray]]:
        """The tensor in pieces of up to `rows` rows, each with the index of its first row."""
        ...


class SafetensorsSource:
    """The tensors of a checkpoint folder: `model.safetensors`, or the files of `model.safetensors.index.json`.

    `name` is the folder or hub id that the user set, for error messages.
    """

    def __init__(self, folder: Path, name: str):
        self._file: dict[str, Path] = {}
        self._dtypes: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._open: tuple[Path, safe_open] | None = None
        for file in _files(folder, name):
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
        """The file of a tensor, for error messages."""
        ...
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
        """The tensor in pieces of up to `rows` rows, each with the index of its first row."""
        ...
        self.dtype(name)
        count = self.shapes[name][0]
        for first in range(0, count, rows):
            # With plain reads a slice would read the whole tensor. A new memory map per piece releases earlier pieces.
            with safe_open(self._file[name], framework="np", backend="mmap") as tensors:
                yield first, tensors.get_slice(name)[first : min(first + rows, count)]

    def _tensors(self, name: str) -> safe_open:
        # Keep the last file open: tensors are mostly read in the order of files, and opening parses the header again.
        file = self._file[name]
        if self._open is None or self._open[0] != file:
            self._open = file, safe_open(file, framework="np", backend="pread")
        return self._open[1]


def _files(folder: Path, name: str) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():  # has priority over the index, as in transformers
        return [single]
    if not index.is_file():
        raise _nothing_to_read(folder, name)
    try:
        weight_map = read_object(index).get("weight_map")
    except JSONFileError as error:
        raise CheckpointError(f"{index}: not a safetensors index ({error}); copy or download it again.") from error
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: not a safetensors index (it has no weight_map); copy or download it again.")
    named = list(weight_map.values())
    for file in named:
        if not isinstance(file, str) or not is_name(file):
            raise CheckpointError(f"{index}: it names the file {str(file)[:300]!r}, which is not in its folder.")
    files = sorted(set(named))
    for file in files:
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file} is missing; {index.name} names it. Copy or download it.")
    return [folder / file for file in files]


def _nothing_to_read(folder: Path, name: str) -> Exception:
    convert = (
        "convert them once, on any machine with torch:\n"
        '  python -c "from transformers import AutoModelForCausalLM as Model, AutoTokenizer as Tokenizer; '
        f"Model.from_pretrained('{name}').save_pretrained('converted'); "
        f"Tokenizer.from_pretrained('{name}').save_pretrained('converted')\""
    )
    pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
    if pickled:
        return CheckpointError(
            f"{name} has only pickled weights ({', '.join(pickled[:3])}), which can run code when loaded and are "
            f"therefore not supported. If you trust them, {convert}"
        )
    if (folder / ADAPTER).is_file():
        return CheckpointError(adapter_message(folder, name))
    missing = f"{name} has no model.safetensors, model.safetensors.index.json or .gguf file"
    if folder == local_path(name):
        return FileNotFoundError(f"{missing}.")
    return CheckpointError(f"{missing}. If its weights are pickled (pytorch_model.bin) and you trust them, {convert}")


def adapter_message(folder: Path, name: str) -> str:
    """The error message for a PEFT adapter: its type and base model, and how to merge it into the base model.

    Args:
      folder: has the adapter's adapter_config.json.
      name: the folder or hub id that the user set.
    """
    try:
        config = read_object(folder / ADAPTER)
        kind, base = str(config.get("peft_type")), str(config.get("base_model_name_or_path"))
    except (JSONFileError, OSError):
        kind = base = "None"
    valid = re.fullmatch(r"[\w./-]+", base) and base != "None"  # it becomes part of a command
    return (
        f"{name} is a PEFT adapter{f' ({kind})' if kind != 'None' else ''}, not a whole model: it only changes the "
        f"weights of its base model, {base if valid else 'which its adapter_config.json does not name'}. Adapters are "
        "not supported. Merge it once, on any machine with torch and peft:\n"
        '  python -c "from peft import AutoPeftModelForCausalLM as Model; from transformers import AutoTokenizer as '
        f"Tokenizer; Model.from_pretrained('{name}').merge_and_unload().save_pretrained('merged'); "
        f"Tokenizer.from_pretrained('{base if valid else 'BASE_MODEL'}').save_pretrained('merged')\""
    )
