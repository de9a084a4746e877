"""Statistics over the real tokens of a batch.

All functions reduce over all elements. Under `jit` with sharded inputs they are global: the result does not depend on
the number of devices.
"""

import chex
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jax_rlhf.rl.types import AnyArray


def masked_sum(x: Float[AnyArray, "*batch T"], mask: Bool[AnyArray, "*batch T"]) -> Float[Array, ""]:
    """Σ x over the elements whose mask is True; 0 if the mask is empty.

    Elements of x whose mask is False have no effect, even if they are NaN.
    """
    chex.assert_type([x, mask], [float, bool])
    chex.assert_equal_shape([x, mask])
    return jnp.sum(jnp.where(mask, x, 0))


def masked_mean(x: Float[AnyArray, "*batch T"], mask: Bool[AnyArray, "*batch T"]) -> Float[Array, ""]:
    """Σ x / n over the n elements whose mask is True; 0 if the mask is empty."""
    return masked_sum(x, mask) / jnp.maximum(jnp.sum(mask), 1)


def masked_variance(x: Float[AnyArray, "*batch T"], mask: Bool[AnyArray, "*batch T"]) -> Float[Array, ""]:
    """The biased variance Σ (x − mean)² / n over the n elements whose mask is True; 0 if the mask is empty."""
    centred, _ = _centred(x, mask)
    return masked_mean(jnp.square(centred), mask)


def _centred(
    x: Float[AnyArray, "*batch T"], mask: Bool[AnyArray, "*batch T"]
) -> tuple[Float[Array, "*batch T"], Float[Array, ""]]:
    """(x − mean, mean). The second pass removes the rounding error of the first mean.

    Without it, equal large numbers would not be centred to 0 exactly, and whitening would amplify the error.
    """
    mean, x = masked_mean(x, mask), jnp.asarray(x)
    error = masked_mean(x - mean, mask)
    return x - mean - error, mean + error


def masked_whiten(
    x: Float[AnyArray, "*batch T"], mask: Bool[AnyArray, "*batch T"], *, shift_mean: bool = True
) -> Float[Array, "*batch T"]:
    """(x − mean) / √(variance + 1e-8) with the masked mean and biased variance; 0 where the mask is False.

    Args:
      x: elements whose mask is False have no effect.
      mask: True = element counts.
      shift_mean: False adds the mean back, so that only the variance is normalised (for rewards).

    Source: Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO", detail 6 (reward and advantage
    whitening); variance biased as in OpenAI's lm-human-preferences.
    """
    centred, mean = _centred(x, mask)
    whitened = centred / jnp.sqrt(masked_mean(jnp.square(centred), mask) + 1e-8)
    return jnp.where(mask, whitened if shift_mean else whitened + mean, 0)


def predicted_tokens(mask: Bool[AnyArray, "*batch T"]) -> Bool[AnyArray, "*batch T-1"]:
    """Marks the tokens, from the second on, that a language model predicts: real tokens that follow a real token."""
    return mask[..., 1:] & mask[..., :-1]
