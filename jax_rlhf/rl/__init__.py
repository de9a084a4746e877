"""The mathematics of PPO for language models: pure functions over per-token arrays."""

from jax_rlhf.rl.advantages import gae
from jax_rlhf.rl.kl import AdaptiveKL, AdaptivePenalty, FixedKL, kl_estimate
from jax_rlhf.rl.losses import (
    bradley_terry_loss,
    clipped_surrogate,
    clipped_value_loss,
    penalized_surrogate,
    token_ranking_loss,
)
from jax_rlhf.rl.masked import masked_mean, masked_sum, masked_variance, masked_whiten, predicted_tokens
from jax_rlhf.rl.token_rewards import shaped_scores, token_rewards
from jax_rlhf.rl.types import Batch, Experience, FrozenActivations, Prompts, check_experience

__all__ = [
    "AdaptiveKL",
    "AdaptivePenalty",
    "Batch",
    "Experience",
    "FixedKL",
    "FrozenActivations",
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
    "predicted_tokens",
    "shaped_scores",
    "token_ranking_loss",
    "token_rewards",
]
