"""The settings of supervised fine-tuning."""

import dataclasses
from typing import Literal

from jax_rlhf.optim.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """The SFT phase.

    Attributes:
      epochs: passes over the data, where `steps` is None.
      steps: optimizer steps; None = `epochs`.
      loss_on: tokens of "completion"s, or "all", prompts too.
      microbatch_size: rows whose activations exist at once, on all devices together; None = the whole batch.
      eval_every: steps between evaluations on held-out rows; 0 = only before the first and after the last.
      sample_rows: held-out prompts that the trained model answers, into samples.jsonl; 0 = none.
      sample_tokens: longest answer to those, in tokens.
      optimizer: see `OptimizerConfig`.
    """

    epochs: float = 1.0
    steps: int | None = None
    loss_on: Literal["completion", "all"] = "completion"
    microbatch_size: int | None = None
    eval_every: int = 0
    sample_rows: int = 8
    sample_tokens: int = 64
    optimizer: OptimizerConfig = dataclasses.field(default_factory=lambda: OptimizerConfig(learning_rate=2e-5))
