"""Metrics of an experience and of the updates on it, under TRL's names."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jaxtyping import Bool, Float32

from jax_rlhf.ppo.config import PPOConfig
from jax_rlhf.ppo.state import PPOState
from jax_rlhf.rl import Experience, masked_mean, masked_sum, masked_variance, shaped_scores, token_rewards


class LossSums(struct.PyTreeNode):
    """Losses and statistics, summed over a microbatch's tokens and divided by the minibatch's token count.

    Attributes:
      policy_loss, value_loss, ptx_loss: the losses, without entropy bonus and coefficients.
      entropy: in nats.
      approx_kl: ½ (log ρ)², in nats.
      penalty_kl: k3(old ‖ new), in nats.
      clipped: fraction of tokens whose policy gradient is zero because PPO-clip is active.
      value_clipped: fraction of tokens where the clipped value loss exceeds the unclipped one.
      ratio: ρ.
      ratio_gap: the largest |ρ − 1|; the only field that is a maximum instead of a sum.
    """

    policy_loss: Float32[Array, "*steps"]
    value_loss: Float32[Array, "*steps"]
    ptx_loss: Float32[Array, "*steps"]
    entropy: Float32[Array, "*steps"]
    approx_kl: Float32[Array, "*steps"]
    penalty_kl: Float32[Array, "*steps"]
    clipped: Float32[Array, "*steps"]
    value_clipped: Float32[Array, "*steps"]
    ratio: Float32[Array, "*steps"]
    ratio_gap: Float32[Array, "*steps"]


class StepMetrics(struct.PyTreeNode):
    """Metrics of one minibatch, or of all minibatches of an iteration along axis 0.

    Attributes:
      sums: summed over the microbatches.
      done: False after early stopping at `target_kl`, where nothing is computed.
      taken: whether the optimizer step was applied.
      actor_norm, critic_norm: gradient norms before clipping.
      actor_lr, critic_lr: learning rates of the step.
    """

    sums: LossSums
    done: Bool[Array, "*steps"]
    taken: Bool[Array, "*steps"]
    actor_norm: Float32[Array, "*steps"]
    critic_norm: Float32[Array, "*steps"]
    actor_lr: Float32[Array, "*steps"]
    critic_lr: Float32[Array, "*steps"]


def policy_sums(
    config: PPOConfig,
    batch: Experience,
    *,
    policy_loss: Float32[Array, "B R"],
    entropy: Float32[Array, "B R"],
    log_ratio: Float32[Array, "B R"],
    old_to_new: Float32[Array, "B R"],
    tokens: Float32[Array, ""],
) -> LossSums:
    """The actor's sums over a microbatch; `value_loss`, `value_clipped` and `ptx_loss` are 0.

    Args:
      config: PPO's.
      batch: the microbatch.
      policy_loss: per token, without entropy bonus.
      entropy: H, in nats.
      log_ratio: log ρ, in nats.
      old_to_new: k3(old ‖ new), in nats.
      tokens: number of real response tokens in the minibatch.
    """
    mask, ratio, advantages, zero = batch.response_mask, jnp.exp(log_ratio), batch.advantages, jnp.float32(0)
    low, high = config.loss.clip_ranges
    clipped = ((advantages < 0) & (ratio < 1 - low)) | ((advantages > 0) & (ratio > 1 + high))  # [b, R]
    mean = lambda x: masked_sum(x.astype(jnp.float32), mask) / tokens  # noqa: E731
    return LossSums(
        policy_loss=mean(policy_loss),
        value_loss=zero,
        ptx_loss=zero,
        entropy=mean(entropy),
        approx_kl=mean(0.5 * jnp.square(log_ratio)),
        penalty_kl=mean(old_to_new),
        clipped=mean(clipped),
        value_clipped=zero,
        ratio=mean(ratio),
        ratio_gap=jnp.max(jnp.abs(ratio - 1), initial=0, where=mask),
    )


def add_gradients_and_sums(total: tuple[Any, LossSums], more: tuple[Any, LossSums]) -> tuple[Any, LossSums]:
    """Adds the (gradients, sums) of two microbatches; the ratio gap is their maximum."""
    gradients, sums = jax.tree.map(jnp.add, total, more)
    return gradients, sums.replace(ratio_gap=jnp.maximum(total[1].ratio_gap, more[1].ratio_gap))


def experience_metrics(
    config: PPOConfig, experience: Experience, kl_coef: Float32[Array, ""]
) -> dict[str, Float32[Array, ""]]:
    """Metrics of one iteration's experience; sums are over a response, means over the batch.

    Args:
      config: PPO's.
      experience: with scores and rewards.
      kl_coef: the β of its rewards.

    Returns:
      By name:
        objective/kl: Σ log π − log π_ref, in nats per response; objective/kl_per_token: its mean per token.
        objective/entropy: Σ −log π of the sampled tokens, in nats per response.
        objective/scores, objective/scores_std: mean and standard deviation of the scores before clipping and penalties.
        objective/rlhf_reward: the optimised objective: the score, clipped, minus the penalty for a missing EOS, minus
          the KL penalty with the config's estimator and reduction.
        objective/non_score_reward: minus the KL penalty.
        objective/kl_coef: β.
        objective/response_length: tokens per response, EOS included.
        objective/eos_rate, val/num_eos_tokens: fraction and number of responses that end with EOS.
        val/explained_variance: 1 − var(returns − values) / var(returns).
        val/sampler_logprob_gap: the largest |log π of the sampler − log π of the scorer|, in nats.
        val/kept_mass: mean probability mass that the sampling filters leave.
        val/bad_scores: number of responses whose score is not finite.
    """
    mask = experience.response_mask
    log_ratio = jnp.where(mask, experience.logprobs - experience.ref_logprobs, 0)  # [B, R]
    kl = jnp.mean(jnp.sum(log_ratio, axis=1))
    scores = jnp.mean(experience.scores)
    keywords = {"kl_coef": kl_coef, "kl_kind": config.kl.kind, "kl_reduction": config.kl.reduction}
    zero = jnp.zeros_like(experience.scores)  # [B]
    kl_rewards = token_rewards(zero, experience.logprobs, experience.ref_logprobs, mask, **keywords)  # [B, R]
    penalty = jnp.mean(jnp.sum(kl_rewards, axis=1))
    shaping = {"clip": config.reward.clip, "missing_eos_penalty": config.reward.missing_eos_penalty}
    optimised = jnp.mean(shaped_scores(experience.scores, experience.ended, **shaping))
    ended = experience.ended.astype(jnp.float32)  # [B]
    variance = masked_variance(experience.returns, mask)
    unexplained = masked_variance(experience.returns - experience.values, mask)
    return {
        "objective/kl": kl,
        "objective/kl_per_token": masked_mean(log_ratio, mask),
        "objective/entropy": jnp.mean(jnp.sum(jnp.where(mask, -experience.logprobs, 0), axis=1)),
        "objective/scores": scores,
        "objective/scores_std": jnp.std(experience.scores),
        "objective/non_score_reward": penalty,
        "objective/rlhf_reward": optimised + penalty,
        "objective/kl_coef": kl_coef,
        "objective/response_length": jnp.mean(jnp.sum(mask, axis=1).astype(jnp.float32)),
        "objective/eos_rate": jnp.mean(ended),
        "val/num_eos_tokens": jnp.sum(ended),
        "val/explained_variance": 1 - unexplained / jnp.maximum(variance, 1e-12),
        "val/sampler_logprob_gap": jnp.max(
            jnp.abs(experience.logprobs - experience.sampler_logprobs), where=mask, initial=0
        ),
        "val/kept_mass": masked_mean(experience.kept_mass, mask),
        "val/bad_scores": jnp.sum(~jnp.isfinite(experience.scores)).astype(jnp.float32),
    }


def update_metrics(state: PPOState, steps: StepMetrics) -> dict[str, Float32[Array, ""]]:
    """Means over the minibatches that were computed (`done`); each leaf of `steps` is [epochs · minibatches]."""
    sums = steps.sums
    mean = lambda x: masked_mean(x.astype(jnp.float32), steps.done)  # noqa: E731
    last = jnp.sum(steps.done) - 1
    ratio_variance = masked_mean(jnp.square(sums.ratio - mean(sums.ratio)), steps.done)
    return {
        "policy/approxkl_avg": mean(sums.approx_kl),
        "policy/clipfrac_avg": mean(sums.clipped),
        "policy/entropy_avg": mean(sums.entropy),
        "policy/grad_norm": mean(steps.actor_norm),
        "policy/penalty_kl": mean(sums.penalty_kl),
        "policy/penalty_coef": jnp.asarray(state.penalty.value),
        "loss/policy_avg": mean(sums.policy_loss),
        "loss/value_avg": mean(sums.value_loss),
        "loss/ptx_avg": mean(sums.ptx_loss),
        "val/clipfrac_avg": mean(sums.value_clipped),
        "val/grad_norm": mean(steps.critic_norm),
        "val/ratio": mean(sums.ratio),
        "val/ratio_var": ratio_variance,
        "val/first_ratio_gap": sums.ratio_gap[0],
        "val/last_ratio_gap": sums.ratio_gap[last],
        "val/largest_ratio_gap": jnp.max(jnp.where(steps.done, sums.ratio_gap, 0)),
        "val/updates": jnp.sum(steps.taken).astype(jnp.float32),
        "val/skipped_updates": state.skipped_updates.astype(jnp.float32),
        "val/bad_steps": state.bad_steps.astype(jnp.float32),
        "lr": steps.actor_lr[last],
        "lr_critic": steps.critic_lr[last],
    }
