"""Rewards per token: the score at the last token, minus the KL penalty at every token."""

from typing import Literal

import chex
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jax_rlhf.rl.kl import KLKind, kl_estimate
from jax_rlhf.rl.types import AnyArray, Scalar


def token_rewards(
    scores: Float[AnyArray, "B"],
    logprobs: Float[AnyArray, "B R"],
    ref_logprobs: Float[AnyArray, "B R"],
    mask: Bool[AnyArray, "B R"],
    *,
    kl_coef: Scalar,
    kl_kind: KLKind = "k1",
    kl_reduction: Literal["sum", "mean"] = "sum",
) -> Float[Array, "B R"]:
    """The score at the last real token, minus the KL penalty at every real token.

    r_t = −β kl_t + [t is the last real token] · score

    Args:
      scores: in reward units.
      logprobs, ref_logprobs: in nats.
      mask: True through EOS.
      kl_coef: β, in reward units per nat.
      kl_kind: the estimator of kl_t.
      kl_reduction: "sum": Σ_t r_t = score − β Σ kl_t, so that a shorter response has a smaller penalty; "mean": kl_t is
        divided by the length of its response, so that the penalty does not depend on length.

    Returns:
      In reward units, 0 where the mask is False. A row without real tokens has reward 0.

    Raises:
      ValueError: unknown kl_kind or kl_reduction.

    Source: Ziegler et al. 2019, eq. 2; Stiennon et al. 2020, section 3.4.
    """
    chex.assert_type([scores, logprobs, ref_logprobs, mask], [float, float, float, bool])
    chex.assert_rank([scores, logprobs, ref_logprobs, mask], [1, 2, 2, 2])
    chex.assert_equal_shape([logprobs, ref_logprobs, mask])
    kl = jnp.where(mask, kl_estimate(logprobs, ref_logprobs, kl_kind), 0)  # [B, R]
    if kl_reduction == "mean":
        kl = kl / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
    elif kl_reduction != "sum":
        raise ValueError(f'kl_reduction={kl_reduction!r} must be "sum" or "mean".')
    return -kl_coef * kl + jnp.where(last_real(mask), scores[:, None], 0)


def shaped_scores(
    scores: Float[AnyArray, "B"],
    ended: Bool[AnyArray, "B"],
    *,
    clip: float | None = None,
    missing_eos_penalty: float = 0.0,
) -> Float[AnyArray, "B"]:
    """Scores clipped to ±clip, minus the penalty for responses without EOS; in reward units.

    Args:
      scores: in reward units.
      ended: True = the response ends with EOS.
      clip: in reward units; None = no clipping.
      missing_eos_penalty: in reward units.
    """
    chex.assert_type([scores, ended], [float, bool])
    chex.assert_rank([scores, ended], 1)
    if clip is not None:
        scores = jnp.clip(scores, -clip, clip)
    return scores - missing_eos_penalty * ~ended


def last_real(mask: Bool[AnyArray, "B R"]) -> Bool[Array, "B R"]:
    """Marks the last True of each row; a row of all False has no mark."""
    slot = jnp.arange(mask.shape[1])  # [R]
    return jnp.asarray(mask) & (slot == jnp.max(jnp.where(mask, slot, -1), axis=1, keepdims=True))
