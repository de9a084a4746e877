"""The mathematics of PPO for language models: pure functions over per-token arrays."""

from jax_rlhf.rl.advantages import gae
from jax_rlhf.rl.experience import Experience, Prompts, check_experience, shaped_scores, token_rewards
from jax_rlhf.rl.kl import AdaptiveKL, AdaptivePenalty, FixedKL, kl_estimate
from jax_rlhf.rl.losses import (
    bradley_terry_loss,
    clipped_surrogate,
    clipped_value_loss,
    penalized_surrogate,
    token_ranking_loss,
)
from jax_rlhf.rl.masked import masked_mean, masked_sum, masked_variance, masked_whiten

__all__ = [
    "AdaptiveKL",
    "AdaptivePenalty",
    "Experience",
    "FixedKL",
    "Prompts",
    "bradley_terry_loss",
    "check_experience",
    "clipped_surrogate",
    "clipped_value_loss",
    "gae",
    "kl_estimate",
    "masked_mean",
    "masked_sum",
    "masked_variance",
    "masked_whiten",
    "penalized_surrogate",
    "shaped_scores",
    "token_ranking_loss",
    "token_rewards",
]
