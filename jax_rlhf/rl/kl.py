"""KL divergence: estimators from samples, and controllers of the KL coefficients."""

from typing import Literal

import chex
import jax.numpy as jnp
from flax import struct
from jaxtyping import Float

from jax_rlhf.rl.losses import MAX_LOG_RATIO
from jax_rlhf.rl.types import AnyArray, Scalar

_MIN_COEF, _MAX_COEF = 1e-8, 1e8  # an adaptive coefficient that reached 0 or ∞ could not change any more

KLKind = Literal["k1", "k2", "k3", "abs"]


def kl_estimate(
    logprobs: Float[AnyArray, "*batch T"], ref_logprobs: Float[AnyArray, "*batch T"], kind: KLKind = "k1"
) -> Float[AnyArray, "*batch T"]:
    """Estimates KL(π ‖ π_ref) from tokens sampled from π, per token.

    k1 = log π − log π_ref;  k2 = ½ k1²;  k3 = exp(−k1) − 1 + k1;  abs = |k1|

    k1 and k3 are unbiased; k3 is never negative and has lower variance. k2 is biased, but its gradient is good.

    Args:
      logprobs: log π of the sampled tokens, in nats.
      ref_logprobs: log π_ref of the same tokens, in nats.
      kind: the estimator.

    Returns:
      In nats per token. The exponent of k3 is clamped at 20.

    Raises:
      ValueError: unknown kind.

    Source: Schulman 2020, "Approximating KL divergence".
    """
    chex.assert_type([logprobs, ref_logprobs], float)
    chex.assert_equal_shape([logprobs, ref_logprobs])
    k1 = logprobs - ref_logprobs
    if kind == "k1":
        return k1
    if kind == "k2":
        return 0.5 * jnp.square(k1)
    if kind == "k3":
        return jnp.expm1(jnp.minimum(-k1, MAX_LOG_RATIO)) + k1
    if kind == "abs":
        return jnp.abs(k1)
    raise ValueError(f'kind={kind!r} must be "k1", "k2", "k3" or "abs".')


class FixedKL(struct.PyTreeNode):
    """A constant KL coefficient.

    Attributes:
      value: β, in reward units per nat.
    """

    value: Scalar

    def update(self, kl: Scalar, n_episodes: int) -> "FixedKL":
        """Returns the same controller."""
        del kl, n_episodes
        return self


class AdaptiveKL(struct.PyTreeNode):
    """A KL coefficient that adapts so that the KL approaches a target.

    β ← β · max(1 + clip(KL / target − 1, ±0.2) · n_episodes / horizon, 0.1)

    The lower bound of 0.1 is not in the paper. Without it, the factor can be negative with more than 5 · horizon
    episodes in a batch.

    Attributes:
      value: β, in reward units per nat, clamped to [1e-8, 1e8].
      target: target KL, in nats per response.
      horizon: number of episodes over which β may change by 20 %.

    Source: Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", section 2.2.
    """

    value: Scalar
    target: Scalar
    horizon: Scalar

    def update(self, kl: Scalar, n_episodes: int) -> "AdaptiveKL":
        """The controller after a batch.

        Args:
          kl: measured KL, in nats, summed over each response and averaged over the batch. If it is not finite, β does
            not change.
          n_episodes: number of responses in the batch.
        """
        error = jnp.clip(kl / self.target - 1, -0.2, 0.2)
        factor = jnp.maximum(1 + error * n_episodes / self.horizon, 0.1)
        value = jnp.clip(self.value * factor, _MIN_COEF, _MAX_COEF)
        return self.replace(value=jnp.where(jnp.isfinite(kl), value, self.value))


class AdaptivePenalty(struct.PyTreeNode):
    """The penalty coefficient of PPO-penalty: doubled if the KL is above 1.5 · target, halved if below target / 1.5.

    Attributes:
      value: β, clamped to [1e-8, 1e8], so that it can recover.
      target: target of KL(old ‖ new) after an update, in nats per token.

    Source: Schulman et al. 2017, section 4.
    """

    value: Scalar
    target: Scalar

    def update(self, kl: Scalar) -> "AdaptivePenalty":
        """The controller after an update.

        Args:
          kl: measured mean of KL(old ‖ new), in nats per token. NaN and +∞ double β.
        """
        too_small = kl < self.target / 1.5
        too_large = jnp.logical_not(kl <= 1.5 * self.target)
        value = self.value * jnp.where(too_large, 2.0, jnp.where(too_small, 0.5, 1.0))
        return self.replace(value=jnp.clip(value, _MIN_COEF, _MAX_COEF))
