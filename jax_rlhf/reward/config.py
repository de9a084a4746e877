"""The settings of the reward phase."""

import dataclasses
from typing import Literal

from jax_rlhf.optim.config import OptimizerConfig
from jax_rlhf.settings import check_ranges


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """The reward phase."""

    start_from: str | None = None
    """The checkpoint from which the reward model starts; None = the SFT phase's model."""
    start_revision: str | None = None
    """The revision of `start_from`, if it is a hub id."""
    num_layers: int | None = None
    """The number of layers to keep, counted from the bottom; None = all."""
    trainable_layers: int | None = None
    """The number of layers that are trained, counted from the top; None = all parameters."""
    epochs: float = 1.0
    """Passes over the data, if `steps` is None; a second pass overfits."""
    steps: int | None = None
    """Optimizer steps; None = as many as `epochs` takes."""
    microbatch_size: int | None = None
    """Pairs that are differentiated at once, on all devices in total; None = the whole batch."""
    eval_every: int = 0
    """Steps between evaluations on held-out pairs; 0 = only after the last step."""
    loss: Literal["bradley_terry", "token"] = "bradley_terry"
    """"bradley_terry", on the scores of complete answers; or "token", DeepSpeed-Chat's loss per token."""
    compare: Literal["pairs", "all"] = "pairs"
    """"pairs": the two answers of a pair; "all": each chosen answer with every rejected one of the batch, for labelled
    texts."""
    head_learning_rate: float | None = None
    """The learning rate of the scalar head; None = that of the other parameters."""
    normalize_rows: int = 256
    """Responses of the SFT policy on which scores are normalised to mean 0 and standard deviation 1; 0 = no
    normalisation."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=lambda: OptimizerConfig(learning_rate=1e-5))
    """The optimizer."""

    def __post_init__(self) -> None:
        check_ranges(
            self,
            above_0=("epochs", "head_learning_rate"),
            at_least_1=("steps", "microbatch_size", "num_layers"),
            at_least_0=("eval_every", "normalize_rows", "trainable_layers"),
        )
        if self.start_revision is not None and self.start_from is None:
            raise ValueError(
                f"start_revision={self.start_revision} is set without config.reward.start_from; the revision of the "
                "SFT model is config.model.revision."
            )
        if self.loss == "token" and self.compare == "all":
            raise ValueError(
                'config.reward: loss="token" compares the two answers of a pair, token by token; '
                'compare="all" is for loss="bradley_terry".'
            )
