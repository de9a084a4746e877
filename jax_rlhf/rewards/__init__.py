"""Sources of rewards. A reward model on the mesh is the engine's; here are functions over texts."""

from jax_rlhf.rewards.functions import Failures, OnFailure, RewardError, RewardFunction, score_texts

__all__ = ["Failures", "OnFailure", "RewardError", "RewardFunction", "score_texts"]
