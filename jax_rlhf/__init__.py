"""RLHF on a mesh, in JAX: supervised fine-tuning, reward model, PPO."""

import importlib
import os
from importlib import metadata
from typing import TYPE_CHECKING, Any

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is missing is no news: it is not used

if TYPE_CHECKING:
    from jax_rlhf.data import DataConfig, DataError, Datasets, create_datasets
    from jax_rlhf.hub import CheckpointError, Pretrained, load_pretrained, save_pretrained
    from jax_rlhf.optim.config import OptimizerConfig
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

_MODULES = {
    "CheckpointError": "hub",
    "DataConfig": "data",
    "DataError": "data",
    "Datasets": "data",
    "Experience": "rl",
    "OptimizerConfig": "optim.optimizer",
    "PPOConfig": "ppo.config",
    "PPOTrainer": "ppo.trainer",
    "Pretrained": "hub",
    "Prompts": "rl",
    "RLHFEngine": "ppo.engine",
    "RewardError": "rewards",
    "RewardFunction": "rewards",
    "Samples": "sampling",
    "create_datasets": "data",
    "load_pretrained": "hub",
    "sample": "sampling",
    "save_pretrained": "hub",
    "token_logprobs": "sampling",
}
"""Public name → the module that has it, which is imported when the name is first used."""

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


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
