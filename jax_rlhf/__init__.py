"""RLHF on a mesh, in JAX: supervised fine-tuning, reward model, PPO."""

from jax_rlhf.data import DataConfig, DataError, Datasets, create_datasets
from jax_rlhf.engine import RLHFEngine
from jax_rlhf.hub import CheckpointError, Pretrained, load_pretrained, save_pretrained
from jax_rlhf.rewards import RewardError, RewardFunction
from jax_rlhf.rl import Experience, Prompts
from jax_rlhf.rollout import Samples, sample, token_logprobs
from jax_rlhf.trainer import PPOTrainer
from jax_rlhf.training import OptimizerConfig, PPOConfig

__all__ = [
    "CheckpointError",
    "DataConfig",
    "DataError",
    "Datasets",
    "Experience",
    "OptimizerConfig",
    "PPOConfig",
    "PPOTrainer",
    "Pretrained",
    "Prompts",
    "RLHFEngine",
    "RewardError",
    "RewardFunction",
    "Samples",
    "create_datasets",
    "load_pretrained",
    "sample",
    "save_pretrained",
    "token_logprobs",
]
