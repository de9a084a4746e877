"""Rewards per token: the score at the last one, the KL penalty at every one."""

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
    """The score at the last real token, less the KL penalty at every one.

    r_t = −β kl_t + [t is the last real token] · score

    Args:
      scores: in reward units.
      logprobs, ref_logprobs: in nats.
      mask: True through EOS.
      kl_coef: β, reward units per nat.
      kl_kind: the estimate of kl_t.
      kl_reduction: "sum": Σ_t r_t = score − β Σ kl_t, under which a short response pays less; "mean": each row's kl_t
        is divided by its length, so that length is neutral.

    Returns:
      In reward units, 0 where the mask is False. A row without a real token has no reward.

    Source: Ziegler et al. 2019, eq. 2; Stiennon et al. 2020, section 3.4.
    """
    chex.assert_type([scores, logprobs, ref_logprobs, mask], [float, float, float, bool])
    chex.assert_rank([scores, logprobs, ref_logprobs, mask], [1, 2, 2, 2])
    chex.assert_equal_shape([logprobs, ref_logprobs, mask])
    kl = jnp.where(mask, kl_estimate(logprobs, ref_logprobs, kl_kind), 0)  # [B, R]
    if kl_reduction == "mean":
        kl = kl / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
    elif kl_reduction != "sum":
        raise ValueError(f'kl_reduction={kl_reduction!r}; "sum" and "mean" are the forms there are.')
    return -kl_coef * kl + jnp.where(last_real(mask), scores[:, None], 0)


def shaped_scores(
    scores: Float[AnyArray, "B"],
    ended: Bool[AnyArray, "B"],
    *,
    clip: float | None = None,
    missing_eos_penalty: float = 0.0,
) -> Float[AnyArray, "B"]:
    """What is optimised of the scores: clipped to ± clip, less the penalty where a response has no EOS.

    Args:
      scores: in reward units.
      ended: the response has its EOS.
      clip: in reward units; None = none.
      missing_eos_penalty: in reward units.

    Returns:
      In reward units.
    """
    chex.assert_type([scores, ended], [float, bool])
    chex.assert_rank([scores, ended], 1)
    if clip is not None:
        scores = jnp.clip(scores, -clip, clip)
    return scores - missing_eos_penalty * ~ended


def last_real(mask: Bool[AnyArray, "B R"]) -> Bool[Array, "B R"]:
    """Marks the last True of each row.

    Args:
      mask: True = real token.

    Returns:
      One True per row, none in a row of False.
    """
    slot = jnp.arange(mask.shape[1])  # [R]
    return jnp.asarray(mask) & (slot == jnp.max(jnp.where(mask, slot, -1), axis=1, keepdims=True))
