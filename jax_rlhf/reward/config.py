"""The settings of the reward phase."""

import dataclasses
from typing import Literal

from jax_rlhf.optim.config import OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """The reward phase."""

    start_from: str | None = None
    """The checkpoint that the reward model starts from; None = the SFT phase's model."""
    start_revision: str | None = None
    """The revision of `start_from`, if it is a hub id."""
    num_layers: int | None = None
    """The number of its layers to keep, counted from the bottom; None = all."""
    trainable_layers: int | None = None
    """The number of layers that are trained, counted from the top; None = all parameters."""
    epochs: float = 1.0
    """Passes over the data, if `steps` is None. A second pass overfits."""
    steps: int | None = None
    """Optimizer steps; None = as many as `epochs` takes."""
    microbatch_size: int | None = None
    """Pairs per forward and backward pass, summed over all devices; None = the whole batch."""
    eval_every: int = 0
    """Steps between evaluations on held-out pairs; 0 = only after the last step."""
    loss: Literal["bradley_terry", "token"] = "bradley_terry"
    """The ranking loss: "bradley_terry" on the scores of whole answers, or "token", DeepSpeed-Chat's loss on the value
    of each token."""
    compare: Literal["pairs", "all"] = "pairs"
    """The comparisons: "pairs" compares each chosen answer with its own rejected one; "all" with every rejected answer
    of the batch, for texts with labels."""
    head_learning_rate: float | None = None
    """The learning rate of the scalar head; None = `optimizer.learning_rate`."""
    normalize_rows: int = 256
    """The number of responses of the SFT policy on which scores are normalized to mean 0 and standard deviation 1; 0 =
    no normalization."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=lambda: OptimizerConfig(learning_rate=1e-5))
    """The optimizer."""

    def __post_init__(self) -> None:
        if self.loss == "token" and self.compare == "all":
            raise ValueError(
                'config.reward: loss="token" compares the two answers of a pair, token by token; '
                'compare="all" is for loss="bradley_terry".'
            )
