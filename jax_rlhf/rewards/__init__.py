"""Sources of rewards. A reward model on the mesh is the engine's; here are functions over texts."""

from jax_rlhf.rewards.functions import (
    Failures,
    OnFailure,
    RewardError,
    RewardFunction,
    asks_for_special_tokens_of,
    score_texts,
)

__all__ = ["Failures", "OnFailure", "RewardError", "RewardFunction", "asks_for_special_tokens_of", "score_texts"]
