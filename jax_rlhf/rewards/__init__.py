"""Reward functions: Python functions that score texts. (The engine runs the reward model on the mesh.)"""

from jax_rlhf.rewards.functions import (
    Failures,
    OnFailure,
    RewardError,
    RewardFunction,
    asks_for_special_tokens_of,
    score_texts,
)

__all__ = ["Failures", "OnFailure", "RewardError", "RewardFunction", "asks_for_special_tokens_of", "score_texts"]
