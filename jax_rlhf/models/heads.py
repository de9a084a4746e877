"""What reads the last hidden states: a token distribution, or one number a token."""

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
"""Whose softmax is 0. Not −∞: 0 · log 0 in an entropy would be NaN; nor float32's lowest, over a temperature."""


def logits_from_table(
    hidden: Float[Array, "*batch E"], table: Float[Array, "rows E"], config: DecoderConfig
) -> Float32[Array, "*batch V"]:
    """hidden · tableᵀ, soft-capped, without the rows that pad the vocabulary; ids that are absent have probability 0.

    Args:
      hidden: what the head reads.
      table: with V rows or more.
      config: the model's.

    Returns:
      Logits.
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
    """An untied LM head; its kernel lies like the embedding table, `[rows, E]`."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, hidden: Float[Array, "*batch E"]) -> Float32[Array, "*batch V"]:
        """The logits."""
        shape = (self.config.table_rows, self.config.output_size)
        kernel = self.param("kernel", partitioned(normal_init, ("vocab", "embed")), shape)
        return logits_from_table(hidden, kernel, self.config)


class ScalarHead(nn.Module):
    """One value a token, in float32 whatever the compute dtype: scores of a reward model, values of a critic."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, hidden: Float[Array, "*batch E"]) -> Float32[Array, "*batch"]:
        """The values."""
        width = self.config.output_size
        kernel = self.param("kernel", partitioned(head_init(width), ("embed", None)), (width, 1))
        return project(hidden.astype(jnp.float32), kernel.astype(jnp.float32), 1)[..., 0]
