"""The settings of checkpoints, logs and the watchdog."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state of a phase is saved, and which checkpoints are kept."""

    every: int = 0
    """Steps (PPO: iterations) between checkpoints; 0 = only by time."""
    minutes: float | None = 15.0
    """Minutes between checkpoints; None = only by steps. The end of a phase and a requested stop always write one."""
    keep: int = 2
    """How many of the latest checkpoints are kept."""
    keep_every: int = 0
    """Checkpoints of steps that are multiples of this are kept too; 0 = none."""
    best: str | None = None
    """An evaluation metric, such as "eval/score": the checkpoint with its best value is kept too; None = none."""
    best_mode: Literal["max", "min"] | None = None
    """Whether the highest ("max") or the lowest ("min") value is best; None = "min" for metrics named loss or
    perplexity, "max" for others."""

    def __post_init__(self) -> None:
        for name, least in (("every", 0), ("keep", 1), ("keep_every", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"config.checkpoint.{name}={getattr(self, name)} must be {least} or more.")
        if self.minutes is not None and self.minutes <= 0:
            raise ValueError(f"config.checkpoint.minutes={self.minutes} must be above 0, or None.")

    @property
    def lowest_is_best(self) -> bool:
        """Whether a lower value of the metric `best` is better."""
        if self.best_mode is None:
            return self.best is not None and self.best.endswith(("loss", "perplexity"))
        return self.best_mode == "min"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where metrics are logged, besides metrics.jsonl."""

    tensorboard: bool = True
    """Write TensorBoard files to <workdir>/<phase>/tensorboard."""
    wandb_project: str | None = None
    """The project in Weights & Biases, which must be installed; None = not logged there."""
    table_rows: int = 4
    """Held-out prompts whose responses before and after PPO are printed at the end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
    """When a run counts as stuck: no step, batch, reward or byte of a checkpoint for a long time."""

    factor: float = 20.0
    """A run counts as stuck after this many times the median duration of the phase's latest steps."""
    minutes: float = 30.0
    """The least time without activity, in minutes. The first step of each batch width compiles, which takes long."""
    action: Literal["exit", "warn", "off"] = "exit"
    """"exit": exit with code 75, after which launch scripts restart the run; "warn": warn and wait; "off"."""

    def __post_init__(self) -> None:
        if not (self.factor >= 1 and self.minutes > 0):
            raise ValueError(
                f"config.watchdog.factor={self.factor} must be 1 or more, minutes={self.minutes} above 0; "
                'action="off" turns the watchdog off.'
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """The settings that all phases of a run share.

    Attributes:
      checkpoint, log, watchdog: their settings.
      max_bad_steps: consecutive steps with a non-finite update after which the run stops.
      debug: stop at the first NaN; write checkpoints synchronously.
      longest_call: seconds that a call of a reward function may take, for which the watchdog waits; None = no limit.
      run: all settings of the run as nested dicts, for checkpoints and Weights & Biases.
    """

    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    watchdog: WatchdogConfig = dataclasses.field(default_factory=WatchdogConfig)
    max_bad_steps: int = 5
    debug: bool = False
    longest_call: float | None = None
    run: Mapping[str, Any] = dataclasses.field(default_factory=dict)
