"""Statistics over the real tokens of a batch.

All reduce over every element, so under a sharded `jit` they are global: the same on 1 and on 8 devices.
"""

import chex
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jax_rlhf.rl.types import AnyArray


def masked_sum(x: Float[AnyArray, "*batch T"], mask: Bool[AnyArray, "*batch T"]) -> Float[Array, ""]:
    """Σ x over the elements whose mask is True.

    Args:
      x: what stands where the mask is False, NaN too, has no effect.
      mask: which elements count.

    Returns:
      The sum, 0 if the mask is empty.
    """
    chex.assert_type([x, mask], [float, bool])
    chex.assert_equal_shape([x, mask])
    return jnp.sum(jnp.where(mask, x, 0))


def masked_mean(x: Float[AnyArray, "*batch T"], mask: Bool[AnyArray, "*batch T"]) -> Float[Array, ""]:
    """Σ x / n over the n elements whose mask is True.

    Args:
      x: as in `masked_sum`.
      mask: which elements count.

    Returns:
      The mean, 0 if the mask is empty.
    """
    return masked_sum(x, mask) / jnp.maximum(jnp.sum(mask), 1)


def masked_variance(x: Float[AnyArray, "*batch T"], mask: Bool[AnyArray, "*batch T"]) -> Float[Array, ""]:
    """Σ (x − mean)² / n over the n elements whose mask is True: the biased variance.

    Args:
      x: as in `masked_sum`.
      mask: which elements count.

    Returns:
      The variance, 0 if the mask is empty.
    """
    centred, _ = _centred(x, mask)
    return masked_mean(jnp.square(centred), mask)


def _centred(
    x: Float[AnyArray, "*batch T"], mask: Bool[AnyArray, "*batch T"]
) -> tuple[Float[Array, "*batch T"], Float[Array, ""]]:
    """(x − mean, mean), in two passes: of equal large numbers 0, not their sum's rounding, which whitening blows up."""
    mean, x = masked_mean(x, mask), jnp.asarray(x)
    left = masked_mean(x - mean, mask)
    return x - mean - left, mean + left


def masked_whiten(
    x: Float[AnyArray, "*batch T"], mask: Bool[AnyArray, "*batch T"], *, shift_mean: bool = True
) -> Float[Array, "*batch T"]:
    """(x − mean) / √(variance + 1e-8), with the masked mean and biased variance of all elements.

    Args:
      x: as in `masked_sum`.
      mask: which elements count.
      shift_mean: False adds the mean back, so that only the spread is normalised (for rewards).

    Returns:
      The whitened elements, 0 where the mask is False.

    Source: Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO", detail 6 (reward and advantage
    whitening); variance biased as in OpenAI's lm-human-preferences.
    """
    centred, mean = _centred(x, mask)
    whitened = centred / jnp.sqrt(masked_mean(jnp.square(centred), mask) + 1e-8)
    return jnp.where(mask, whitened if shift_mean else whitened + mean, 0)


def predicted_tokens(mask: Bool[AnyArray, "*batch T"]) -> Bool[AnyArray, "*batch T-1"]:
    """Which tokens of a text a language model predicts: real ones that follow a real one.

    Args:
      mask: True = real token.

    Returns:
      True = predicted, of the tokens from the second on.
    """
    return mask[..., 1:] & mask[..., :-1]
