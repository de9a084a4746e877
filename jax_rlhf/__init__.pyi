from .data import (
    DataConfig as DataConfig,
    DataError as DataError,
    Datasets as Datasets,
    create_datasets as create_datasets,
)
from .hub import (
    CheckpointError as CheckpointError,
    Pretrained as Pretrained,
    load_pretrained as load_pretrained,
    save_pretrained as save_pretrained,
)
from .optim.config import OptimizerConfig as OptimizerConfig
from .ppo.config import PPOConfig as PPOConfig
from .ppo.engine import RLHFEngine as RLHFEngine
from .ppo.trainer import PPOTrainer as PPOTrainer
from .rewards import RewardError as RewardError, RewardFunction as RewardFunction
from .rl import Experience as Experience, Prompts as Prompts
from .sampling import Samples as Samples, sample as sample, token_logprobs as token_logprobs

__version__: str
