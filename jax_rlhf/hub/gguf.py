"""Reads GGUF files of the llama architecture (Llama, SmolLM2, Mistral …) with the `gguf` package.

A GGUF file contains config, tensors and tokenizer. `GGUFSource` presents it as the Hugging Face checkpoint from which
it was made: the config as a `config.json` dict, and the tensors under their Hugging Face names, dequantized one at a
time.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np

from jax_rlhf.hub.checkpoint_error import CheckpointError
from jax_rlhf.hub.gguf_header import check_header
from jax_rlhf.models.rotary import Rotary, frequencies

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>")
_ROTARY_DIVISORS = "rope_freqs.weight"
_STORED_AS = {
    gguf.GGMLQuantizationType.F16: np.dtype(np.float16),
    gguf.GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}


class GGUFSource:
    """The tensors of a llama GGUF file by their Hugging Face names, and its config.

    Attributes:
      shapes: the shape of every tensor.
      config: the content of the corresponding config.json.
      generation_config: the content of the corresponding generation_config.json.
      tokenizer: the metadata under "tokenizer.", without that prefix; empty if the file has no tokenizer.
    """

    def __init__(self, file: Path):
        self.file = file
        try:
            check_header(file)
            reader = gguf.GGUFReader(str(file))
            self._fields = {name: field.contents() for name, field in reader.fields.items()}
        except Exception as error:  # the package has no error type of its own: a corrupt file may raise anything
            raise CheckpointError(
                f"{file}: not a whole GGUF file ({type(error).__name__}: {error}); copy or download it again."
            ) from error
        try:
            self._describe(reader)
        except CheckpointError:
            raise
        except Exception as error:  # metadata of another type, a missing tensor …
            raise CheckpointError(
                f"{file}: its metadata do not describe a llama model ({type(error).__name__}: {error}); copy or "
                "download it again."
            ) from error

    def _describe(self, reader: gguf.GGUFReader) -> None:
        self._check_architecture()
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._divisors = tensors.pop(_ROTARY_DIVISORS, None)
        self._tensors = {self._hub_name(name): tensor for name, tensor in tensors.items()}
        self.shapes = {name: tuple(map(int, reversed(t.shape))) for name, t in self._tensors.items()}
        self._heads = self._field("attention.head_count")
        self._kv_heads = self._field("attention.head_count_kv", self._heads)
        prefix = "tokenizer."
        self.tokenizer = {k.removeprefix(prefix): v for k, v in self._fields.items() if k.startswith(prefix)}
        self.generation_config = {
            "bos_token_id": self.tokenizer.get("ggml.bos_token_id"),
            "eos_token_id": _end_ids(self.tokenizer),
            "pad_token_id": self.tokenizer.get("ggml.padding_token_id"),
        }
        self.config = self._config()

    def where(self, name: str) -> str:
        """The file, for error messages."""
        return str(self.file)

    def dtype(self, name: str) -> np.dtype:
        """The dtype of a tensor: float16 or bfloat16 as stored, and float32 for float32 and quantized tensors."""
        tensor = self._tensors[name]
        try:
            gguf.quants.dequantize(tensor.data[:1], tensor.tensor_type)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.file}: tensor {tensor.name!r} has the type {tensor.tensor_type.name}, which the gguf package "
                "cannot dequantize; use a file of another type (Q8_0, Q4_K …)."
            ) from error
        return _STORED_AS.get(tensor.tensor_type, np.dtype(np.float32))

    def read(self, name: str) -> np.ndarray:
        """The dequantized tensor, with the rows of queries and keys in Hugging Face's order."""
        dtype, tensor = self.dtype(name), self._tensors[name]
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(dtype, copy=False)
        array = array.reshape(self.shapes[name])
        heads = {"q_proj": self._heads, "k_proj": self._kv_heads}.get(name.split(".")[-2])
        return array if heads is None else _half_rotation_order(array, heads)

    def read_rows(self, name: str, rows: int) -> Iterator[tuple[int, np.ndarray]]:
        """The tensor in pieces of rows; only for tensors without heads: embeddings, norms."""
        dtype, tensor = self.dtype(name), self._tensors[name]
        for first in range(0, self.shapes[name][0], rows):
            piece = gguf.quants.dequantize(tensor.data[first : first + rows], tensor.tensor_type)
            yield first, piece.astype(dtype, copy=False)

    def _check_architecture(self) -> None:
        architecture = self._fields.get("general.architecture")
        if architecture != "llama":
            raise CheckpointError(
                f"{self.file}: the architecture is {architecture!r}; only GGUF files of 'llama' are supported. Use the "
                "safetensors checkpoint."
            )
        if self._fields.get("llama.expert_count"):
            raise CheckpointError(f"{self.file}: a mixture of experts is not supported.")

    def _field(self, name: str, *default: Any) -> Any:
        if f"llama.{name}" not in self._fields and not default:
            raise CheckpointError(f"{self.file}: metadata llama.{name} is missing; convert the file again.")
        value = self._fields.get(f"llama.{name}", *default)
        if isinstance(value, list):  # one value per layer; a llama has the same in all layers
            if len(set(value)) > 1:
                raise CheckpointError(f"{self.file}: llama.{name} differs between layers, which is not supported.")
            value = value[0]
        return value

    def _hub_name(self, name: str) -> str:
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
        if match is None or match[2] not in _NAMES:
            raise CheckpointError(f"{self.file}: tensor {name!r} is not a tensor of a llama model.")
        layer, module, kind = match.groups()
        return f"model.layers.{layer}.{_NAMES[module]}.{kind}" if layer else f"{_NAMES[module]}.{kind}"

    def _config(self) -> dict[str, Any]:
        hidden = self._field("embedding_length")
        head_dim = self._field("attention.key_length", hidden // self._heads)
        rotated = self._field("rope.dimension_count", head_dim)
        if rotated != head_dim:
            raise CheckpointError(
                f"{self.file}: it rotates {rotated} of the {head_dim} dimensions of a head; only full rotation is "
                "supported."
            )
        first = "model.layers.0."
        config = {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": self.shapes["model.embed_tokens.weight"][0],
            "hidden_size": hidden,
            "intermediate_size": self._field("feed_forward_length"),
            "num_hidden_layers": self._field("block_count"),
            "num_attention_heads": self._heads,
            "num_key_value_heads": self._kv_heads,
            "head_dim": head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self._field("context_length"),
            "rms_norm_eps": _shortest(self._field("attention.layer_norm_rms_epsilon")),
            "tie_word_embeddings": "lm_head.weight" not in self.shapes,
            "attention_bias": f"{first}self_attn.q_proj.bias" in self.shapes,
            "mlp_bias": f"{first}mlp.up_proj.bias" in self.shapes,
            "rope_parameters": self._rope_parameters(head_dim),
        }
        return config | self.generation_config

    def _rope_parameters(self, head_dim: int) -> dict[str, Any]:
        theta = _shortest(self._field("rope.freq_base", 10000.0))
        kind = self._field("rope.scaling.type", "none")
        plain = {"rope_type": "default", "rope_theta": theta}
        if self._divisors is not None:
            return plain | self._llama3_parameters(theta, head_dim)
        if kind == "none":
            return plain
        factor = _shortest(self._field("rope.scaling.factor", 1.0))
        if kind == "linear":
            return plain | {"rope_type": "linear", "factor": factor}
        if kind == "yarn":
            first = self._field("rope.scaling.original_context_length")
            return plain | {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": first}
        raise CheckpointError(f"{self.file}: llama.rope.scaling.type {kind!r} is not supported.")

    def _llama3_parameters(self, theta: float, head_dim: int) -> dict[str, Any]:
        # A file has only the divisor of each frequency. Find the published llama3 settings that give these divisors.
        assert self._divisors is not None  # the caller has looked
        divisors = np.asarray(self._divisors.data, np.float64).reshape(-1)
        plain = frequencies(Rotary(theta=theta, dim=head_dim))
        for factor in (8.0, 32.0, 16.0, 4.0, 2.0):
            setting = {
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
            scaled = frequencies(
                Rotary(theta=theta, dim=head_dim, kind="llama3", factor=factor, original_max_positions=8192)
            )
            if divisors.shape == plain.shape and np.allclose(plain / scaled, divisors, rtol=1e-3):
                return {"rope_type": "llama3", **setting}
        raise CheckpointError(
            f"{self.file}: tensor {_ROTARY_DIVISORS!r} does not match any known setting of Llama 3; use the "
            "safetensors checkpoint of this model."
        )


def _end_ids(tokenizer: Mapping[str, Any]) -> int | list[int] | None:
    """The ids of tokens that end an answer, one or several: the file's end of text, of turn and of message.

    If the file does not name the end of turn, it is found by its text, as llama.cpp does; here only tokens count that
    the chat template writes.
    """
    named = [tokenizer.get(f"ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    if named[1] is None:
        template = tokenizer.get("chat_template") or ""
        ends = {token for token in _TURN_ENDS if token in template}
        named += [index for index, token in enumerate(tokenizer.get("ggml.tokens", ())) if token in ends]
    ids = list(dict.fromkeys(index for index in named if index is not None))
    return ids if len(ids) > 1 else ids[0] if ids else None


def _half_rotation_order(array: np.ndarray, heads: int) -> np.ndarray:
    # llama.cpp rotates pairs of neighbours, Hugging Face pairs from the two halves of a head; reorder rows (or biases).
    rows = array.shape[0] // heads
    return array.reshape(heads, rows // 2, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _shortest(value: float) -> float:
    # GGUF stores float32; the original number is the shortest decimal that rounds to it (1e-5, not 9.99999e-6).
    return float(str(np.float32(value))) if math.isfinite(value) else value
