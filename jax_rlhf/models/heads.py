"""The heads on the last hidden states: logits, or one value per token."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Float32

from jax_rlhf.models.config import DecoderConfig
from jax_rlhf.models.layers import head_init, normal_init, partitioned, softcap
from jax_rlhf.models.products import look_up_logits, project
from jax_rlhf.parallel import constrained

_NO_LOGIT = -1e30
"""A logit with softmax 0. Not −∞, for which 0 · log 0 in the entropy would be NaN. Not the lowest float32, which would
overflow when divided by a temperature below 1."""


def logits_from_table(
    hidden: Float[Array, "*batch E"], table: Float[Array, "rows E"], config: DecoderConfig
) -> Float32[Array, "*batch V"]:
    """hidden · tableᵀ, soft-capped, without the padding rows of the table; absent ids get probability 0.

    Args:
      hidden: the head's input.
      table: with V rows or more.
      config: the model's.
    """
    logits = look_up_logits(hidden.astype(config.dtype), table.astype(config.dtype))  # [..., rows]
    logits = constrained(logits, config.layout, "rows", *("length",) * (logits.ndim - 2), "vocab")
    logits = softcap(logits, config.logit_softcap)[..., : config.vocab_size]
    if not config.absent_ids:
        return logits
    present = np.ones(config.vocab_size, bool)  # [V]
    present[list(config.absent_ids)] = False
    return jnp.where(present, logits, _NO_LOGIT)


class LMHead(nn.Module):
    """An untied LM head; its kernel has the embedding table's shape and axes, `[rows, E]`."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, hidden: Float[Array, "*batch E"]) -> Float32[Array, "*batch V"]:
        """The logits."""
        shape = (self.config.table_rows, self.config.output_size)
        kernel = self.param("kernel", partitioned(normal_init, ("vocab", "embed")), shape)
        return logits_from_table(hidden, kernel, self.config)


class ScalarHead(nn.Module):
    """One value per token, in float32 for any compute dtype: scores of a reward model, values of a critic."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, hidden: Float[Array, "*batch E"]) -> Float32[Array, "*batch"]:
        """The values."""
        width = self.config.output_size
        kernel = self.param("kernel", partitioned(head_init(width), ("embed", None)), (width, 1))
        return project(hidden.astype(jnp.float32), kernel.astype(jnp.float32), 1)[..., 0]
