"""The pieces of training: settings, optimizers, and the two device programs of a PPO iteration."""

from jax_rlhf.settings import from_mapping
from jax_rlhf.training.config import PPOConfig
from jax_rlhf.training.objective import PretrainingRows
from jax_rlhf.training.optimizer import OptimizerConfig, create_optimizer, learning_rate_schedule
from jax_rlhf.training.state import PPOState

__all__ = [
    "OptimizerConfig",
    "PPOConfig",
    "PPOState",
    "PretrainingRows",
    "create_optimizer",
    "from_mapping",
    "learning_rate_schedule",
]
