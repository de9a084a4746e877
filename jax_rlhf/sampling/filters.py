"""Which tokens may be drawn: top-k and top-p, without sorting the vocabulary.

Both are a threshold a row: keep what is at least as large. The threshold is found by bisection over the logits' bit
patterns: exact, in at most 32 passes over the row.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array


def keep_top_k(logits: Array, k: int) -> Array:
    """The k largest of each row; ties with the last of them are kept too.

    Args:
      logits: float32[B, V].
      k: 1 to V, in tokens.

    Returns:
      bool[B, V].
    """
    ordered = _ordered_bits(logits)
    return ordered >= _largest_threshold(ordered, lambda kept: jnp.sum(kept, axis=1) >= k)


def keep_top_p(logits: Array, p: float) -> Array:
    """The fewest tokens, largest first, whose probabilities sum to p or more; ties with the last are kept too.

    Args:
      logits: float32[B, V], −∞ for what is filtered out already.
      p: 0 < p < 1.

    Returns:
      bool[B, V], at least one True a row.

    Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1.
    """
    ordered, probabilities = _ordered_bits(logits), jax.nn.softmax(logits, axis=1)
    mass = lambda kept: jnp.sum(jnp.where(kept, probabilities, 0), axis=1)  # noqa: E731
    return ordered >= _largest_threshold(ordered, lambda kept: mass(kept) >= p)


def _ordered_bits(x: Array) -> Array:
    # float32 → int32 with the same order: negative floats count down as their bits count up.
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _largest_threshold(ordered: Array, enough: Callable[[Array], Array]) -> Array:
    """The largest t, int32[B, 1], with enough(ordered ≥ t); the row's least value where none is."""
    low, high = jnp.min(ordered, axis=1), jnp.max(ordered, axis=1)  # the answer lies in [low, high]

    def halve(bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        # ⌈(low + high) / 2⌉ without overflow
        middle = (low >> 1) + (high >> 1) + (low & high & 1) + ((low ^ high) & 1)
        good = enough(ordered >= middle[:, None])
        return jnp.where(good, middle, low), jnp.where(good, high, middle - 1)

    low, _ = jax.lax.while_loop(lambda bounds: jnp.any(bounds[0] < bounds[1]), halve, (low, high))
    return low[:, None]
