"""RLHF on a mesh, in JAX: supervised fine-tuning, reward model, PPO."""

import os
from importlib import metadata

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is missing is no news: it is not used

from jax_rlhf.data import DataConfig, DataError, Datasets, create_datasets
from jax_rlhf.hub import CheckpointError, Pretrained, load_pretrained, save_pretrained
from jax_rlhf.optim.optimizer import OptimizerConfig
from jax_rlhf.ppo.config import PPOConfig
from jax_rlhf.ppo.engine import RLHFEngine
from jax_rlhf.ppo.trainer import PPOTrainer
from jax_rlhf.rewards import RewardError, RewardFunction
from jax_rlhf.rl import Experience, Prompts
from jax_rlhf.sampling import Samples, sample, token_logprobs

try:
    __version__ = metadata.version("jax_rlhf")
except metadata.PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0.1.0"

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
    "__version__",
    "create_datasets",
    "load_pretrained",
    "sample",
    "save_pretrained",
    "token_logprobs",
]
