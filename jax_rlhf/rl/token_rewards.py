"""Rewards per token: the score at the last one, the KL penalty at every one."""

from typing import Literal

import chex
import jax.numpy as jnp
from jax import Array

from jax_rlhf.rl.kl import KLKind, kl_estimate


def token_rewards(
    scores: Array,
    logprobs: Array,
    ref_logprobs: Array,
    mask: Array,
    *,
    kl_coef: Array | float,
    kl_kind: KLKind = "k1",
    kl_reduction: Literal["sum", "mean"] = "sum",
) -> Array:
    """The score at the last real token, less the KL penalty at every one.

    r_t = −β kl_t + [t is the last real token] · score

    Args:
      scores: float[B], in reward units.
      logprobs, ref_logprobs: float[B, R], in nats.
      mask: bool[B, R], True through EOS.
      kl_coef: β, reward units per nat.
      kl_kind: the estimate of kl_t.
      kl_reduction: "sum": Σ_t r_t = score − β Σ kl_t, under which a short response pays less; "mean": each row's kl_t
        is divided by its length, so that length is neutral.

    Returns:
      float[B, R], 0 where the mask is False. A row without a real token has no reward.

    Source: Ziegler et al. 2019, eq. 2; Stiennon et al. 2020, section 3.4.
    """
    chex.assert_type([scores, logprobs, ref_logprobs, mask], [float, float, float, bool])
    chex.assert_rank([scores, logprobs, ref_logprobs, mask], [1, 2, 2, 2])
    chex.assert_equal_shape([logprobs, ref_logprobs, mask])
    kl = jnp.where(mask, kl_estimate(logprobs, ref_logprobs, kl_kind), 0)
    if kl_reduction == "mean":
        kl = kl / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
    elif kl_reduction != "sum":
        raise ValueError(f'kl_reduction={kl_reduction!r}; "sum" and "mean" are the forms there are.')
    return -kl_coef * kl + jnp.where(last_real(mask), scores[:, None], 0)


def shaped_scores(scores: Array, ended: Array, *, clip: float | None = None, missing_eos_penalty: float = 0.0) -> Array:
    """What is optimised of the scores: clipped to ± clip, less the penalty where a response has no EOS.

    Args:
      scores: float[B], in reward units.
      ended: bool[B], the response has its EOS.
      clip: in reward units; None = none.
      missing_eos_penalty: in reward units.

    Returns:
      float[B].
    """
    chex.assert_type([scores, ended], [float, bool])
    chex.assert_rank([scores, ended], 1)
    if clip is not None:
        scores = jnp.clip(scores, -clip, clip)
    return scores - missing_eos_penalty * ~ended


def last_real(mask: Array) -> Array:
    """Marks the last True of each row.

    Args:
      mask: bool[B, R].

    Returns:
      bool[B, R], one True a row, none in a row of False.
    """
    slot = jnp.arange(mask.shape[1])
    return mask & (slot == jnp.max(jnp.where(mask, slot, -1), axis=1, keepdims=True))
