"""KL divergence: estimates from samples, and the controllers of its coefficients."""

from typing import Literal

import chex
import jax.numpy as jnp
from flax import struct
from jaxtyping import Float

from jax_rlhf.rl.losses import MAX_LOG_RATIO
from jax_rlhf.rl.types import AnyArray, Scalar

_LEAST, _MOST = 1e-8, 1e8  # bounds of an adaptive coefficient, from where it can come back

KLKind = Literal["k1", "k2", "k3", "abs"]


def kl_estimate(
    logprobs: Float[AnyArray, "*batch T"], ref_logprobs: Float[AnyArray, "*batch T"], kind: KLKind = "k1"
) -> Float[AnyArray, "*batch T"]:
    """An estimate of KL(π ‖ π_ref) from tokens that π sampled, per token.

    k1 = log π − log π_ref;  k2 = ½ k1²;  k3 = exp(−k1) − 1 + k1;  abs = |k1|

    k1 and k3 are unbiased, k3 is never negative and varies less; k2 is biased, with a good gradient.

    Args:
      logprobs: log π of the sampled tokens, in nats.
      ref_logprobs: log π_ref of the same tokens, in nats.
      kind: which one.

    Returns:
      In nats per token. The exponent of k3 is clamped at 20.

    Raises:
      ValueError: the kind is not one of these.

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
    raise ValueError(f'kind={kind!r}; "k1", "k2", "k3" and "abs" are the estimates there are.')


class FixedKL(struct.PyTreeNode):
    """A KL coefficient that stays.

    Attributes:
      value: β, reward units per nat.
    """

    value: Scalar

    def update(self, kl: Scalar, n_episodes: int) -> "FixedKL":
        """The same controller, whatever was measured."""
        del kl, n_episodes
        return self


class AdaptiveKL(struct.PyTreeNode):
    """A KL coefficient that steers KL towards a target.

    β ← β · max(1 + clip(KL / target − 1, ±0.2) · n_episodes / horizon, 0.1)

    The bound is not in the paper: with more than 5 · horizon episodes in a batch the other factor is negative.

    Attributes:
      value: β, reward units per nat, kept within 1e-8 to 1e8.
      target: KL wanted, in nats per response.
      horizon: episodes over which β may change by 20 %.

    Source: Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", section 2.2.
    """

    value: Scalar
    target: Scalar
    horizon: Scalar

    def update(self, kl: Scalar, n_episodes: int) -> "AdaptiveKL":
        """The controller after a batch.

        Args:
          kl: measured KL, in nats: summed over each response, averaged over the batch. Where it is not finite, nothing
            changes.
          n_episodes: responses in the batch.

        Returns:
          A new controller.
        """
        error = jnp.clip(kl / self.target - 1, -0.2, 0.2)
        factor = jnp.maximum(1 + error * n_episodes / self.horizon, 0.1)
        value = jnp.clip(self.value * factor, _LEAST, _MOST)
        return self.replace(value=jnp.where(jnp.isfinite(kl), value, self.value))


class AdaptivePenalty(struct.PyTreeNode):
    """The penalty coefficient of PPO-penalty: doubled where KL is above 1.5 · target, halved below target / 1.5.

    Attributes:
      value: β, kept within 1e-8 to 1e8, from where it can come back.
      target: KL(old ‖ new) wanted after an update, in nats per token.

    Source: Schulman et al. 2017, section 4.
    """

    value: Scalar
    target: Scalar

    def update(self, kl: Scalar) -> "AdaptivePenalty":
        """The controller after an update.

        Args:
          kl: measured mean of KL(old ‖ new), in nats per token. Where it is not finite, β is doubled.

        Returns:
          A new controller.
        """
        too_small = kl < self.target / 1.5
        too_large = jnp.logical_not(kl <= 1.5 * self.target)
        value = self.value * jnp.where(too_large, 2.0, jnp.where(too_small, 0.5, 1.0))
        return self.replace(value=jnp.clip(value, _LEAST, _MOST))
