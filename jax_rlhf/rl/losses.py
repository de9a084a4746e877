"""Losses to minimise, per token or per pair. No function here reduces over the batch.

Reduce with `masked_sum` over a microbatch and divide by the token count of the whole minibatch. Then the accumulated
gradients equal those of one large batch, for any distribution of lengths.
"""

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jax_rlhf.rl.types import AnyArray, Scalar

MAX_LOG_RATIO = 20.0  # e²⁰ ≈ 5e8, so that the ratio of a single token cannot overflow the loss


def clipped_surrogate(
    log_ratio: Float[AnyArray, "*batch T"],
    advantages: Float[AnyArray, "*batch T"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> Float[Array, "*batch T"]:
    """PPO-clip, per token.

    L_t = max(−A ρ, −A clip(ρ, 1 − ε_low, 1 + ε_high)),  ρ = exp(log_ratio);  with dual clip min(L_t, c |A|) where A < 0

    Args:
      log_ratio: log π(a) − log π_old(a), in nats; clamped to ±20.
      advantages: in reward units, or whitened.
      clip_low, clip_high: ε_low and ε_high.
      dual_clip: c > 1, caps the loss where A < 0; without a cap (None) it is unbounded there.

    Returns:
      The loss of each token, in the unit of the advantages.

    Raises:
      ValueError: dual_clip is not above 1.

    Source: Schulman et al. 2017, "Proximal Policy Optimization Algorithms", eq. 7; dual clip: Ye et al. 2020,
    "Mastering Complex Control in MOBA Games with Deep RL", eq. 3; ε_high ≠ ε_low: Yu et al. 2025, "DAPO".
    """
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip={dual_clip} must be above 1; it caps the loss at dual_clip · |advantage|.")
    chex.assert_type([log_ratio, advantages], float)
    chex.assert_equal_shape([log_ratio, advantages])
    ratio = _ratio(log_ratio)
    loss = jnp.maximum(-advantages * ratio, -advantages * jnp.clip(ratio, 1 - clip_low, 1 + clip_high))
    if dual_clip is None:
        return loss
    return jnp.where(advantages < 0, jnp.minimum(loss, dual_clip * jnp.abs(advantages)), loss)


def penalized_surrogate(
    log_ratio: Float[AnyArray, "*batch T"],
    advantages: Float[AnyArray, "*batch T"],
    kl: Float[AnyArray, "*batch T"],
    *,
    beta: Scalar,
) -> Float[Array, "*batch T"]:
    """PPO-penalty, per token.

    L_t = −A ρ + β kl,  ρ = exp(log_ratio)

    Args:
      log_ratio: log π(a) − log π_old(a), in nats; clamped to ±20.
      advantages: in reward units, or whitened.
      kl: KL(old ‖ new) in nats, estimated or exact: `kl_estimate(old_logprobs, logprobs, "k3")`.
      beta: β, from `AdaptivePenalty`.

    Returns:
      The loss of each token, in the unit of the advantages.

    Source: Schulman et al. 2017, eq. 8.
    """
    chex.assert_type([log_ratio, advantages, kl], float)
    chex.assert_equal_shape([log_ratio, advantages, kl])
    return -jnp.asarray(advantages) * _ratio(log_ratio) + beta * jnp.asarray(kl)


def clipped_value_loss(
    values: Float[AnyArray, "*batch T"],
    old_values: Float[AnyArray, "*batch T"],
    returns: Float[AnyArray, "*batch T"],
    *,
    clip_range: float = 0.2,
) -> Float[Array, "*batch T"]:
    """PPO's clipped value loss, per token.

    L_t = ½ max((V_t − R_t)², (clip(V_t, V_old,t − ε, V_old,t + ε) − R_t)²)

    Args:
      values: the critic's current values, in reward units.
      old_values: its values at the time of the rollout.
      returns: unwhitened advantages + old_values.
      clip_range: ε, in reward units.

    Returns:
      The loss of each token, in reward units squared.

    Source: OpenAI baselines ppo2; Huang et al. 2022, "The 37 Implementation Details of PPO", detail 9.
    """
    chex.assert_type([values, old_values, returns], float)
    chex.assert_equal_shape([values, old_values, returns])
    clipped = old_values + jnp.clip(values - old_values, -clip_range, clip_range)
    return 0.5 * jnp.maximum(jnp.square(values - returns), jnp.square(clipped - returns))


def bradley_terry_loss(
    chosen_scores: Float[AnyArray, "B"],
    rejected_scores: Float[AnyArray, "B"],
    *,
    margin: Float[AnyArray, "B"] | None = None,
) -> Float[Array, "B"]:
    """−log σ(chosen − rejected − margin), per pair.

    Args:
      chosen_scores, rejected_scores: scores of the whole answers, in reward units.
      margin: the least wanted difference of the scores, in reward units; None = 0.

    Returns:
      The loss of each pair, in nats.

    Source: Ouyang et al. 2022, "InstructGPT", eq. 1; margin: Touvron et al. 2023, "Llama 2", eq. 2.
    """
    chex.assert_type([chosen_scores, rejected_scores], float)
    chex.assert_equal_shape([chosen_scores, rejected_scores])
    difference = chosen_scores - rejected_scores
    if margin is not None:
        chex.assert_type(margin, float)
        chex.assert_equal_shape([chosen_scores, margin])
        difference = difference - margin
    return -jax.nn.log_sigmoid(difference)


def token_ranking_loss(
    chosen_scores: Float[AnyArray, "B T"],
    rejected_scores: Float[AnyArray, "B T"],
    chosen_ids: Int[AnyArray, "B T"],
    rejected_ids: Int[AnyArray, "B T"],
    chosen_mask: Bool[AnyArray, "B T"],
    rejected_mask: Bool[AnyArray, "B T"],
) -> Float[Array, "B"]:
    """The mean of −log σ(chosen_t − rejected_t) from the first differing token to the end of the longer answer.

    For a pair of identical answers, only the last slot counts, as in DeepSpeed-Chat.

    Args:
      chosen_scores, rejected_scores: one score per token, in reward units.
      chosen_ids, rejected_ids: prompt and answer, padded on the right.
      chosen_mask, rejected_mask: True = real token.

    Returns:
      The loss of each pair, in nats.

    Source: DeepSpeed-Chat, `training/utils/model/reward_model.py`.
    """
    floats, ids, masks = [chosen_scores, rejected_scores], [chosen_ids, rejected_ids], [chosen_mask, rejected_mask]
    chex.assert_type(floats + ids + masks, [float, float, int, int, bool, bool])
    chex.assert_rank(floats + ids + masks, 2)
    chex.assert_equal_shape(floats + ids + masks)
    slot = jnp.arange(chosen_ids.shape[1])  # [T]
    either = jnp.logical_or(chosen_mask, rejected_mask)  # [B, T]
    differ = jnp.logical_and(either, (chosen_ids != rejected_ids) | (chosen_mask != rejected_mask))  # [B, T]
    any_differs = jnp.any(differ, axis=1, keepdims=True)  # [B, 1]
    first = jnp.argmax(differ, axis=1, keepdims=True)  # [B, 1]
    end = jnp.max(jnp.where(either, slot + 1, 0), axis=1, keepdims=True)  # [B, 1]
    counted = jnp.where(any_differs, (slot >= first) & (slot < end), slot == slot[-1])  # [B, T]
    loss = jnp.where(counted, -jax.nn.log_sigmoid(chosen_scores - rejected_scores), 0)
    return jnp.sum(loss, axis=1) / jnp.sum(counted, axis=1)


def _ratio(log_ratio: Float[AnyArray, "*batch T"]) -> Float[Array, "*batch T"]:
    return jnp.exp(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))
