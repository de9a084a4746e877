"""The settings of supervised fine-tuning."""

import dataclasses
from typing import Literal

from jax_rlhf.optim.config import OptimizerConfig
from jax_rlhf.settings import check_ranges


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """The SFT phase."""

    epochs: float = 1.0
    """Passes over the data, if `steps` is None."""
    steps: int | None = None
    """Optimizer steps; None = as many as `epochs` takes."""
    loss_on: Literal["completion", "all"] = "completion"
    """The tokens in the loss: those of the "completion", or "all", prompts included."""
    microbatch_size: int | None = None
    """Rows that are differentiated at once, on all devices in total; None = the whole batch."""
    eval_every: int = 0
    """Steps between evaluations on held-out rows; 0 = only before the first and after the last step."""
    sample_rows: int = 8
    """Held-out prompts to which the trained model writes responses, for samples.jsonl; 0 = none."""
    sample_tokens: int = 64
    """The longest of these responses, in tokens."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=lambda: OptimizerConfig(learning_rate=2e-5))
    """The optimizer."""

    def __post_init__(self) -> None:
        check_ranges(
            self,
            above_0=("epochs",),
            at_least_1=("steps", "microbatch_size", "sample_tokens"),
            at_least_0=("eval_every", "sample_rows"),
        )
