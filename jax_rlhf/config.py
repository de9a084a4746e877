"""The settings of a whole run."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from jax_rlhf.data.config import PHASES, DataConfig
from jax_rlhf.hub.config import ModelConfig
from jax_rlhf.parallel.config import MeshConfig, RolloutMeshConfig
from jax_rlhf.ppo.config import CriticConfig, FrozenConfig, PPOConfig
from jax_rlhf.reward.config import RewardConfig
from jax_rlhf.runtime.config import CheckpointConfig, LogConfig, PhaseConfig, WatchdogConfig
from jax_rlhf.settings import from_mapping, suggest_value, to_config_dict
from jax_rlhf.sft.config import SFTConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run."""

    phases: tuple[str, ...] = PHASES
    """The phases to run, any of "sft", "reward" and "ppo", in this order."""
    seed: int = 0
    """The seed of all random numbers."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """The number of devices along each mesh axis."""
    rollout_mesh: RolloutMeshConfig = dataclasses.field(default_factory=RolloutMeshConfig)
    """The mesh for sampling, on the same devices; by default chosen from the model's sizes."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    """The policy. The SFT phase starts from `path`; the reward phase and the checks use its tokenizer."""
    sft_model_path: str | None = None
    """The SFT policy, from which the reward and PPO phases start; None = <workdir>/sft/model."""
    reference: FrozenConfig = dataclasses.field(default_factory=FrozenConfig)
    """The reference of PPO; without `path`, the SFT policy."""
    critic: CriticConfig = dataclasses.field(default_factory=CriticConfig)
    """The critic of PPO; without `path`, it starts as the reward model."""
    reward_model: FrozenConfig = dataclasses.field(default_factory=FrozenConfig)
    """The reward model of PPO; without `path`, <workdir>/reward/model, or only `ppo.reward.functions`."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """The data of all phases."""
    sft: SFTConfig = dataclasses.field(default_factory=SFTConfig)
    """The SFT phase."""
    reward: RewardConfig = dataclasses.field(default_factory=RewardConfig)
    """The reward phase."""
    ppo: PPOConfig = dataclasses.field(default_factory=PPOConfig)
    """The PPO phase."""
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    """When checkpoints are written, and which are kept."""
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    """Where metrics are logged, besides metrics.jsonl."""
    watchdog: WatchdogConfig = dataclasses.field(default_factory=WatchdogConfig)
    """When a run counts as stuck, and what happens then."""
    max_bad_steps: int = 5
    """The run stops after this many steps (PPO: iterations) in a row whose update was not finite and was skipped."""
    debug: bool = False
    """Stops at the first NaN, at the first implicit transfer between host and devices, and at an invalid experience;
    writes checkpoints synchronously. Slower."""

    def __post_init__(self) -> None:
        if self.max_bad_steps < 1:
            raise ValueError(f"config.max_bad_steps={self.max_bad_steps} must be 1 or more.")
        for phase in self.phases:
            if phase not in PHASES:
                raise ValueError(f"config.phases: {phase!r} is not a phase; {suggest_value(phase, PHASES, 'phases')}")
        if not self.phases or sorted(self.phases, key=PHASES.index) != list(self.phases):
            raise ValueError(f"config.phases={self.phases} must be one or more of {', '.join(PHASES)}, in this order.")

    def data_of(self, phase: str) -> DataConfig:
        """The data settings of a phase; packing is off for `reward.loss="token"`, which does not support it."""
        if phase == "reward" and self.reward.loss == "token":
            return dataclasses.replace(self.data, packing=False)
        return self.data

    def eval_rows_of(self, phase: str) -> int:
        """The largest number of held-out rows of a phase: `data.eval_rows`, or `ppo.eval_rows` if it is set."""
        return self.ppo.eval_rows if phase == "ppo" and self.ppo.eval_rows is not None else self.data.eval_rows

    @property
    def phase(self) -> PhaseConfig:
        """The settings that all phases share."""
        return PhaseConfig(
            checkpoint=self.checkpoint,
            log=self.log,
            watchdog=self.watchdog,
            max_bad_steps=self.max_bad_steps,
            debug=self.debug,
            longest_call=self.ppo.reward.timeout,
            run=dataclasses.asdict(self),
        )


def default_config() -> ConfigDict:
    """All fields with their defaults, which a config file's `get_config` changes; `ppo.seed` follows `seed`."""
    config = to_config_dict(RunConfig(ppo=PPOConfig(time_phases=True)))
    ppo: Any = config.ppo
    ppo.seed = config.get_oneway_ref("seed")
    return config


def run_config(config: Any) -> RunConfig:
    """Checks every field of a run's settings.

    Args:
      config: a ConfigDict or another mapping of the fields that differ from the defaults, or a `RunConfig`.

    Raises:
      ValueError: an unknown field (the message lists similar names), or an invalid value.
    """
    return from_mapping(RunConfig, config)
