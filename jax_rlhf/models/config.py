"""The architecture of a decoder: one frozen, hashable config for all model families.

A family (Llama, Gemma, GPT-2 …) is a choice of these fields; `hub/families.py` converts a Hugging Face `config.json` to
a `DecoderConfig`. The model code reads only this class.
"""

import dataclasses
import math
import numbers
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jax_rlhf.models.options import AttentionForm, RematPolicy
from jax_rlhf.models.rotary import Rotary
from jax_rlhf.parallel import Layout

NormPlacement = Literal["before", "after", "both"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder-only transformer.

    Sizes:
      vocab_size: V, number of token ids; logits have V columns.
      padded_vocab_size: rows of the embedding table (and LM head), V or more. Rows from V on are padding so that a mesh
        divides the table, or unused ids; they never reach an output.
      absent_ids: unused ids below V; their probability is 0.
      hidden_size: D, width of the residual stream.
      intermediate_size: F, hidden width of the MLP.
      num_layers: L.
      num_heads, num_kv_heads: H query heads share K key/value heads, H a multiple of K.
      head_dim: width of one head; it may differ from D / H.
      embedding_size: width of the token embedding if it is not D (opt-350m); the model then has input and output
        projections.
      max_positions: context length in tokens; with learned positions, rows of their table minus the offset.

    Positions:
      position_kind: "rotary", or "learned" (a table added to the embedding).
      position_offset: rows of the learned table before position 0 (OPT: 2).
      rotary: the rotary embedding; None with learned positions.
      local_rotary: another rotary embedding for the sliding-window layers (Gemma 3); None = they use `rotary`.

    Attention:
      attention_scale: factor on q·k.
      scale_by_layer: also divide that factor by (layer index + 1) (a GPT-2 option).
      attention_softcap: c in c · tanh(score / c), or None.
      sliding_window: W; in the layers that `sliding_layers` marks, a token attends to the last W real tokens, itself
        included.
      sliding_layers: bool per layer.
      qk_norm: RMS norm on each query and key head (Qwen3, Gemma 3).
      qkv_bias, out_bias: biases on the projections into and out of attention.

    Norms and residuals:
      norm_kind: "rms" or "layer".
      norm_placement: norms "before" each block, "after" its residual sum (opt-350m), or on "both" sides of the block
        inside the residual (Gemma 2, 3: four norms per layer).
      norm_epsilon: added to the variance.
      norm_plus_one: the scale is (1 + weight) (Gemma).
      norm_affine: False = norms have no weight and bias (an OPT option).
      final_norm: whether there is a norm before the head.
      parallel_residual: attention and MLP read the same input and are summed (GPT-NeoX).

    MLP and embedding:
      activation: a Hugging Face activation name, see `models/layers.py`.
      gated_mlp: down(act(gate(x)) · up(x)) instead of down(act(up(x))).
      mlp_bias: biases on the projections of the MLP.
      embedding_scale: factor on the token embedding (Gemma: √D).
      tie_embeddings: the LM head is the embedding table.
      logit_softcap: c in c · tanh(logit / c), or None.

    Execution:
      dtype: of activations and matrix products; softmax, norms, rotations and outputs are always float32.
      remat: what the backward pass of a layer recomputes: "none", "full" (the whole layer), or "dots" (all but
        matrix products with weights).
      attention: "xla" (plain attention, on any platform), or "flash" (for whole rows a kernel without scores in memory:
        cuDNN on GPU, splash on TPU); see `models/flash.py`.
      layout: the mesh and its sharding rules; None = one device.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    padded_vocab_size: int | None = None
    absent_ids: tuple[int, ...] = ()
    embedding_size: int | None = None

    position_kind: Literal["rotary", "learned"] = "rotary"
    position_offset: int = 0
    rotary: Rotary | None = None
    local_rotary: Rotary | None = None

    attention_scale: float
    scale_by_layer: bool = False
    attention_softcap: float | None = None
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] = ()
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False

    norm_kind: Literal["rms", "layer"] = "rms"
    norm_placement: NormPlacement = "before"
    norm_epsilon: float = 1e-6
    norm_plus_one: bool = False
    norm_affine: bool = True
    final_norm: bool = True
    parallel_residual: bool = False

    activation: str = "silu"
    gated_mlp: bool = True
    mlp_bias: bool = False
    embedding_scale: float = 1.0
    tie_embeddings: bool = False
    logit_softcap: float | None = None

    dtype: Any = jnp.float32
    remat: RematPolicy = "full"
    attention: AttentionForm = "xla"
    layout: Layout | None = None

    # The original Hugging Face config.json as text, which `save_pretrained` writes with the changed fields. It does not
    # affect the computation, so equality and hash ignore it.
    hf_config: str = dataclasses.field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))  # one type, since configs are compared and hashed
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
            _positive(name, getattr(self, name))
        for name in ("head_dim", "max_positions", "embedding_size", "sliding_window"):
            if getattr(self, name) is not None:
                _positive(name, getattr(self, name))
        for name in ("attention_scale", "attention_softcap", "norm_epsilon", "embedding_scale", "logit_softcap"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, numbers.Real) or not math.isfinite(value)):
                raise ValueError(f"{name}={value!r} must be a finite number.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}: "
                "each key/value head serves an equal group of query heads."
            )
        if self.position_kind == "rotary" and self.rotary is None:
            raise ValueError('position_kind="rotary" needs `rotary`; set position_kind="learned" for a position table.')
        if self.position_kind == "learned" and self.max_positions is None:
            raise ValueError('position_kind="learned" needs max_positions, the rows of its table.')
        for rotary in (self.rotary, self.local_rotary):
            if rotary is not None and rotary.dim + rotary.dim % 2 > self.head_dim:
                raise ValueError(f"rotary dim={rotary.dim}, rounded up to pairs, exceeds head_dim={self.head_dim}.")
        if self.sliding_layers and len(self.sliding_layers) != self.num_layers:
            raise ValueError(
                f"sliding_layers has {len(self.sliding_layers)} entries for {self.num_layers} layers; give one per "
                "layer."
            )
        if any(self.sliding_layers) and not (self.sliding_window and self.sliding_window > 0):
            raise ValueError(f"sliding_layers marks layers, but sliding_window is {self.sliding_window}.")
        if self.padded_vocab_size is not None and self.padded_vocab_size < self.vocab_size:
            raise ValueError(f"padded_vocab_size={self.padded_vocab_size} is below vocab_size={self.vocab_size}.")
        if self.parallel_residual and self.norm_placement != "before":
            raise ValueError('parallel_residual needs norm_placement="before".')

    @property
    def table_rows(self) -> int:
        """Rows of the embedding table: the vocabulary, padded."""
        return self.padded_vocab_size or self.vocab_size

    @property
    def output_size(self) -> int:
        """E, width of the head's input: the embedding size if the model projects back to it, else the hidden size."""
        return self.embedding_size or self.hidden_size

    @property
    def platform(self) -> str:
        """The platform that the model runs on: "cpu", "gpu" or "tpu"."""
        return jax.default_backend() if self.layout is None else self.layout.platform

    def limited_to(self, vocab_size: int, absent_ids: tuple[int, ...] = ()) -> "DecoderConfig":
        """The same decoder with fewer ids: ids from `vocab_size` on, and absent ones, have probability 0."""
        size = min(vocab_size, self.vocab_size)
        absent = tuple(index for index in absent_ids if index < size)
        return self.replace(vocab_size=size, padded_vocab_size=self.table_rows, absent_ids=absent)

    def replace(self, **changes: Any) -> "DecoderConfig":
        """A copy with these fields changed."""
        return dataclasses.replace(self, **changes)


def _positive(name: str, value: Any) -> None:
    # A config.json may contain any number, and no array axis needs more than 31 bits.
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or not 0 < int(value) < 2**31:
        raise ValueError(f"{name}={value!r} must be a whole number from 1 to 2³¹ − 1.")
