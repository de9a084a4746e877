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
    """The revision of a hub id."""
    num_layers: int | None = None
    """How many of its layers to keep, from the bottom; None = all."""
    trainable_layers: int | None = None
    """How many layers train, counted from the top; None = all parameters train."""
    epochs: float = 1.0
    """Passes over the data, where `steps` is None; a second one overfits."""
    steps: int | None = None
    """Optimizer steps; None = `epochs`."""
    microbatch_size: int | None = None
    """Pairs whose activations exist at once, on all devices together; None = the whole batch."""
    eval_every: int = 0
    """Steps between evaluations on held-out pairs; 0 = only after the last."""
    loss: Literal["bradley_terry", "token"] = "bradley_terry"
    """"bradley_terry", on the scores of whole answers, or "token", DeepSpeed-Chat's."""
    compare: Literal["pairs", "all"] = "pairs"
    """"pairs", or "all": each chosen with every rejected of the batch, for texts with labels."""
    head_learning_rate: float | None = None
    """The learning rate of the scalar head; None = that of all parameters."""
    normalize_rows: int = 256
    """Responses of the SFT policy on which scores are brought to mean 0 and deviation 1; 0 = not."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=lambda: OptimizerConfig(learning_rate=1e-5))
    """The optimizer."""

    def __post_init__(self) -> None:
        if self.loss == "token" and self.compare == "all":
            raise ValueError(
                'config.reward: loss="token" compares the two answers of a pair, token by token; '
                'compare="all" is for loss="bradley_terry".'
            )
