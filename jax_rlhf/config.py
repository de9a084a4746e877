"""What `python -m jax_rlhf` can be told: every field, with its default."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from jax_rlhf.data.config import PHASES, DataConfig
from jax_rlhf.hub.config import ModelConfig
from jax_rlhf.parallel.config import MeshConfig, RolloutMeshConfig
from jax_rlhf.ppo.config import CriticConfig, FrozenConfig, PPOConfig
from jax_rlhf.reward.config import RewardConfig
from jax_rlhf.runtime.config import CheckpointConfig, LogConfig, PhaseConfig, WatchdogConfig
from jax_rlhf.settings import from_mapping, one_of, to_config_dict
from jax_rlhf.sft.config import SFTConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run."""

    phases: tuple[str, ...] = PHASES
    """The phases to run, of "sft", "reward" and "ppo", in that order."""
    seed: int = 0
    """The seed of everything random."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """How many devices lie along each axis."""
    rollout_mesh: RolloutMeshConfig = dataclasses.field(default_factory=RolloutMeshConfig)
    """The same devices in another form, for sampling; by default chosen by the model."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    """The policy. `path` is the checkpoint that the SFT phase starts from."""
    sft_model_path: str | None = None
    """The SFT policy, which the reward and PPO phases start from; None = <workdir>/sft/model."""
    reference: FrozenConfig = dataclasses.field(default_factory=FrozenConfig)
    """The reference of PPO; `path` None = the SFT policy."""
    critic: CriticConfig = dataclasses.field(default_factory=CriticConfig)
    """The critic of PPO; `path` None = the reward model."""
    reward_model: FrozenConfig = dataclasses.field(default_factory=FrozenConfig)
    """The reward model of PPO; `path` None = <workdir>/reward/model, or `ppo.reward.functions` alone."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """The data of all phases."""
    sft: SFTConfig = dataclasses.field(default_factory=SFTConfig)
    """The SFT phase."""
    reward: RewardConfig = dataclasses.field(default_factory=RewardConfig)
    """The reward phase."""
    ppo: PPOConfig = dataclasses.field(default_factory=PPOConfig)
    """The PPO phase."""
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    """When checkpoints are written, and which stay."""
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    """Where metrics go, beside metrics.jsonl."""
    watchdog: WatchdogConfig = dataclasses.field(default_factory=WatchdogConfig)
    """When a run counts as standing still."""
    max_bad_steps: int = 5
    """Steps (PPO: iterations) in a row with an update that was not finite, and was left out, before the run stops."""
    debug: bool = False
    """Stop at the first NaN, at the first transfer between host and devices that nobody asked for, and where an
    experience is not what it should be; write checkpoints before going on. Slower."""

    def __post_init__(self) -> None:
        if self.max_bad_steps < 1:
            raise ValueError(f"config.max_bad_steps={self.max_bad_steps} must be 1 or more.")
        for phase in self.phases:
            if phase not in PHASES:
                raise ValueError(f"config.phases: {phase!r} is no phase; {one_of(phase, PHASES, 'phases')}")
        if not self.phases or sorted(self.phases, key=PHASES.index) != list(self.phases):
            raise ValueError(f"config.phases={self.phases}: one or more of {', '.join(PHASES)} in this order.")

    def data_of(self, phase: str) -> DataConfig:
        """The data's settings for a phase: without packing for `reward.loss="token"`, which does not support it."""
        if phase == "reward" and self.reward.loss == "token":
            return dataclasses.replace(self.data, packing=False)
        return self.data

    def eval_rows_of(self, phase: str) -> int:
        """How many held-out rows a phase evaluates on at most: `data.eval_rows`, or `ppo.eval_rows` if it is set."""
        return self.ppo.eval_rows if phase == "ppo" and self.ppo.eval_rows is not None else self.data.eval_rows

    @property
    def phase(self) -> PhaseConfig:
        """What every phase reads."""
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
    """All fields with their defaults, for a config file's `get_config` to change.

    Returns:
      A ConfigDict; `ppo.seed` follows `seed`.
    """
    config = to_config_dict(RunConfig(ppo=PPOConfig(time_phases=True)))
    ppo: Any = config.ppo
    ppo.seed = config.get_oneway_ref("seed")
    return config


def run_config(config: Any) -> RunConfig:
    """The settings of a run, every field checked.

    Args:
      config: a ConfigDict or another mapping of the fields that differ from the defaults, or a `RunConfig`.

    Returns:
      The settings.

    Raises:
      ValueError: an unknown field (with the names nearest to it), or a wrong value.
    """
    return from_mapping(RunConfig, config)
