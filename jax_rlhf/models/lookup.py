"""Lookup of embedding rows, for tokens and positions."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jax_rlhf.models.config import DecoderConfig
from jax_rlhf.parallel import constrained, lookup_layout


def look_up_rows(
    table: Float[Array, "rows E"], indices: Int[Array, "B T"], config: DecoderConfig
) -> Float[Array, "B T E"]:
    """table[indices] in the compute dtype; on a mesh each device gets only its own rows of the batch.

    On a mesh the table stays sharded, and the batch is not sharded along the table's mesh axes: each device looks up
    the rows of its whole group in its own shard of the table. The vocabulary shards are then summed, and the result is
    resharded from columns to rows. Without these constraints, XLA looks up the whole batch on every device if batch
    and table are sharded along a common mesh axis.

    Args:
      table: the embeddings.
      indices: row numbers. An index outside the table gives NaN, which is noticed; clamping would give a plausible but
        wrong row.
      config: the model's.
    """
    layout = lookup_layout(config.layout)
    indices = constrained(indices, layout, "rows", "length")
    rows = table.at[indices].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False).astype(config.dtype)
    rows = constrained(rows, layout, "rows", "length", "embed")  # [B, T, E]
    return constrained(rows, config.layout, "rows", "length", "hidden")
