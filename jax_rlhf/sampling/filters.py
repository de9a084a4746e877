"""Top-k and top-p filtering without sorting the vocabulary.

Both keep the logits of a row that are at or above a threshold. The threshold is found by bisection over the bit
patterns of the logits, which is exact and takes at most 32 passes over the row.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float32, Int32


def keep_top_k(logits: Float32[Array, "B V"], k: int) -> Bool[Array, "B V"]:
    """True for the k largest logits of each row, and for ties with the k-th; k is 1 to V."""
    ordered = _ordered_bits(logits)
    return ordered >= _largest_threshold(ordered, lambda kept: jnp.sum(kept, axis=1) >= k)


def keep_top_p(logits: Float32[Array, "B V"], p: float) -> Bool[Array, "B V"]:
    """True for the fewest tokens, most likely first, whose probabilities sum to p or more, and for ties with the last.

    Args:
      logits: −∞ for tokens that another filter has removed.
      p: 0 < p < 1.

    Returns:
      True = kept; at least one token per row.

    Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1.
    """
    ordered, probabilities = _ordered_bits(logits), jax.nn.softmax(logits, axis=1)  # [B, V]
    mass = lambda kept: jnp.sum(jnp.where(kept, probabilities, 0), axis=1)  # noqa: E731
    return ordered >= _largest_threshold(ordered, lambda kept: mass(kept) >= p)


def _ordered_bits(x: Float32[Array, "B V"]) -> Int32[Array, "B V"]:
    # float32 → int32 with the same order: negative floats count down as their bits count up.
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _largest_threshold(
    ordered: Int32[Array, "B V"], enough: Callable[[Bool[Array, "B V"]], Bool[Array, "B"]]
) -> Int32[Array, "B 1"]:
    """The largest t with enough(ordered ≥ t); the row's minimum if there is none."""
    low, high = jnp.min(ordered, axis=1), jnp.max(ordered, axis=1)  # [B]; t lies in [low, high]

    def halve(bounds: tuple[Int32[Array, "B"], Int32[Array, "B"]]) -> tuple[Int32[Array, "B"], Int32[Array, "B"]]:
        low, high = bounds
        # ⌈(low + high) / 2⌉ without overflow
        middle = (low >> 1) + (high >> 1) + (low & high & 1) + ((low ^ high) & 1)
        good = enough(ordered >= middle[:, None])
        return jnp.where(good, middle, low), jnp.where(good, high, middle - 1)

    low, _ = jax.lax.while_loop(lambda bounds: jnp.any(bounds[0] < bounds[1]), halve, (low, high))
    return low[:, None]
