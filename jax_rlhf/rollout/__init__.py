"""Sampling responses, and scoring tokens."""

from jax_rlhf.rollout.sampler import Samples, Sampling, check_prompts, rollout, rollout_form, sample
from jax_rlhf.rollout.scorer import score_hidden, token_logprobs

__all__ = [
    "Samples",
    "Sampling",
    "check_prompts",
    "rollout",
    "rollout_form",
    "sample",
    "score_hidden",
    "token_logprobs",
]
