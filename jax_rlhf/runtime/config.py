"""The settings of checkpoints, logs and the watchdog."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints of a phase are written, and which are kept."""

    every: int = 0
    """Steps (PPO: iterations) between checkpoints; 0 = by time only, see `minutes`."""
    minutes: float | None = 15.0
    """Minutes between checkpoints; None = by steps only, see `every`. A checkpoint is always written at the end of a
    phase, and when the run is asked to stop."""
    keep: int = 2
    """The number of latest checkpoints to keep."""
    keep_every: int = 0
    """Also keep the checkpoints of steps that are multiples of this; 0 = none."""
    best: str | None = None
    """Also keep the checkpoint with the best value of this evaluation metric, such as "eval/score"; None = none."""
    best_mode: Literal["max", "min"] | None = None
    """Whether the highest ("max") or the lowest ("min") value of `best` is best; None = the lowest if its name ends
    with loss or perplexity, else the highest."""

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
    """The Weights & Biases project to log to (needs the package wandb); None = no logging there."""
    table_rows: int = 4
    """Samples printed before and after training."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
    """The watchdog, for runs that stall: no step, batch or reward is finished, and no byte of a checkpoint is
    written."""

    factor: float = 20.0
    """A run has stalled if it makes no progress for this many times the median duration of the phase's last steps."""
    minutes: float = 30.0
    """The shortest time without progress after which a run has stalled; a step compiles when a batch width first
    occurs."""
    action: Literal["exit", "warn", "off"] = "exit"
    """What happens when a run has stalled. "exit": it exits with code 75, and the launch scripts restart it; "warn": it
    prints a warning; "off": no watchdog."""

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
