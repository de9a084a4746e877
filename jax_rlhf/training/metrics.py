"""What an experience says about the policy, under the names that TRL's users know."""

import jax.numpy as jnp
from jax import Array

from jax_rlhf.rl import Experience, masked_mean, masked_variance, shaped_scores, token_rewards
from jax_rlhf.training.config import PPOConfig


def experience_metrics(config: PPOConfig, experience: Experience, kl_coef: Array) -> dict[str, Array]:
    """Metrics of one iteration's experience; sums are over a response, means over the batch.

    Args:
      config: PPO's.
      experience: what was generated.
      kl_coef: float32[], β that its rewards were made with.

    Returns:
      float32[] each:
        objective/kl: Σ log π − log π_ref, in nats per response; objective/kl_per_token: its mean per token.
        objective/entropy: Σ −log π of the sampled tokens, in nats per response.
        objective/scores, objective/scores_std: from the reward source.
        objective/rlhf_reward: what is optimised: the score, clipped and less the penalty for a missing EOS, less the KL
          penalty, by the estimate and the reduction of the config; objective/non_score_reward: the KL penalty alone.
        objective/kl_coef: β.
        objective/response_length: tokens, EOS included; objective/eos_rate, val/num_eos_tokens: responses that ended.
        val/explained_variance: 1 − var(returns − values) / var(returns).
        val/sampler_logprob_gap: the largest |log π of the sampler − of the scorer|.
        val/kept_mass: mean probability that the sampler's filters left.
        val/bad_scores: responses whose score is not finite.
    """
    mask = experience.response_mask
    log_ratio = jnp.where(mask, experience.logprobs - experience.ref_logprobs, 0)
    kl = jnp.mean(jnp.sum(log_ratio, axis=1))
    scores = jnp.mean(experience.scores)
    how = {"kl_coef": kl_coef, "kl_kind": config.kl_kind, "kl_reduction": config.kl_reduction}
    none = jnp.zeros_like(experience.scores)
    penalty = jnp.mean(jnp.sum(token_rewards(none, experience.logprobs, experience.ref_logprobs, mask, **how), axis=1))
    shape = {"clip": config.reward_clip, "missing_eos_penalty": config.missing_eos_penalty}
    optimised = jnp.mean(shaped_scores(experience.scores, experience.ended, **shape))
    ended = experience.ended.astype(jnp.float32)
    spread = masked_variance(experience.returns, mask)
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
        "val/explained_variance": 1 - unexplained / jnp.maximum(spread, 1e-12),
        "val/sampler_logprob_gap": jnp.max(
            jnp.abs(experience.logprobs - experience.sampler_logprobs), where=mask, initial=0
        ),
        "val/kept_mass": masked_mean(experience.kept_mass, mask),
        "val/bad_scores": jnp.sum(~jnp.isfinite(experience.scores)).astype(jnp.float32),
    }
