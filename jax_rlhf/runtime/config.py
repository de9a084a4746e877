"""The settings of what a long run needs: checkpoints, logs, the watchdog."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a phase's state is saved, and what is kept."""

    every: int = 0
    """Steps (PPO: iterations) between checkpoints; 0 = by time alone."""
    minutes: float | None = 15.0
    """Minutes between checkpoints; None = by steps alone. The end of a phase and a stop that was asked
    for have one in any case."""
    keep: int = 2
    """How many of the last checkpoints stay."""
    keep_every: int = 0
    """Checkpoints of steps that this divides stay as well; 0 = none."""
    best: str | None = None
    """A metric of evaluations, such as "eval/score": the checkpoint where it was best stays as well; None = none."""
    best_mode: Literal["max", "min"] | None = None
    """Whether the highest ("max") or the lowest ("min") is best; None = the lowest of what is called loss or
    perplexity, the highest of all else."""

    def __post_init__(self) -> None:
        for name, least in (("every", 0), ("keep", 1), ("keep_every", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"config.checkpoint.{name}={getattr(self, name)} must be {least} or more.")
        if self.minutes is not None and self.minutes <= 0:
            raise ValueError(f"config.checkpoint.minutes={self.minutes} must be above 0, or None.")

    @property
    def lowest_is_best(self) -> bool:
        """Of the metric `best`."""
        if self.best_mode is None:
            return self.best is not None and self.best.endswith(("loss", "perplexity"))
        return self.best_mode == "min"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where metrics go, beside metrics.jsonl."""

    tensorboard: bool = True
    """TensorBoard files under <phase>/tensorboard."""
    wandb_project: str | None = None
    """Weights & Biases, which must be installed; None = not."""
    table_rows: int = 4
    """Samples shown on the screen, before and after."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
    """When a run counts as standing still: no step, batch, reward or byte of a checkpoint."""

    factor: float = 20.0
    """A run stands still after this many times the median duration of a phase's last steps."""
    minutes: float = 30.0
    """But never sooner than after so many minutes; a step compiles when its width first comes."""
    action: Literal["exit", "warn", "off"] = "exit"
    """"exit": with code 75, after which launch scripts start the run again; "warn": say so and wait; "off"."""

    def __post_init__(self) -> None:
        if not (self.factor >= 1 and self.minutes > 0):
            raise ValueError(
                f"config.watchdog.factor={self.factor} must be 1 or more, minutes={self.minutes} above 0; "
                'action="off" watches nothing.'
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """What every phase of a run reads of its settings.

    Attributes:
      checkpoint, log, watchdog: their settings.
      max_bad_steps: updates in a row that are not finite, after which the run stops.
      debug: stop at the first NaN; write checkpoints before going on.
      longest_call: seconds that a reward function may take, during which the watchdog must wait; None = no limit.
      run: all settings of the run as nested dicts, for checkpoints and Weights & Biases.
    """

    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    watchdog: WatchdogConfig = dataclasses.field(default_factory=WatchdogConfig)
    max_bad_steps: int = 5
    debug: bool = False
    longest_call: float | None = None
    run: Mapping[str, Any] = dataclasses.field(default_factory=dict)
