"""Rows of a table by index: the embedding of tokens and of positions."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jax_rlhf.models.config import DecoderConfig
from jax_rlhf.parallel import constrained, lookup_layout


def look_up_rows(
    table: Float[Array, "rows E"], indices: Int[Array, "B T"], config: DecoderConfig
) -> Float[Array, "B T E"]:
    """table[indices], on a mesh with each device's own rows of the batch alone.

    On a mesh the table keeps its place: a device looks up its columns, in its part of the vocabulary, for the rows that
    it shares with those that hold the other columns. The parts of the vocabulary are then summed, and columns are
    exchanged for rows. Left to itself XLA looks up the whole batch on every device where the batch and the table are
    cut along an axis that both have.

    Args:
      table: of embeddings.
      indices: of rows; one outside the table gives NaN, which is seen, where clamping would give a plausible wrong
        row.
      config: the model's.

    Returns:
      The rows, in the compute dtype.
    """
    layout = lookup_layout(config.layout)
    indices = constrained(indices, layout, "rows", "length")
    found = table.at[indices].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False).astype(config.dtype)
    found = constrained(found, layout, "rows", "length", "embed")
    return constrained(found, config.layout, "rows", "length", "hidden")
