"""The settings of the reward phase."""

import dataclasses
from typing import Literal

from jax_rlhf.optim.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardTrainingConfig:
    """The reward phase.

    Attributes:
      path: the checkpoint that the reward model starts from; None = the SFT phase's model.
      revision: of a hub id.
      num_layers: how many of its layers to keep, from the bottom; None = all.
      trainable_layers: from the top; None = all parameters train.
      epochs, steps, microbatch_size, eval_every: as in the SFT phase; a microbatch is of pairs.
      loss: "bradley_terry", on the scores of whole answers, or "token", DeepSpeed-Chat's.
      compare: "pairs", or "all": each chosen with every rejected of the batch, for texts with labels.
      head_learning_rate: of the scalar head; None = as all else.
      normalize_rows: responses of the SFT policy on which scores are brought to mean 0 and deviation 1; 0 = not.
      optimizer: see `OptimizerConfig`.
    """

    path: str | None = None
    revision: str | None = None
    num_layers: int | None = None
    trainable_layers: int | None = None
    epochs: float = 1.0
    steps: int | None = None
    microbatch_size: int | None = None
    eval_every: int = 0
    loss: Literal["bradley_terry", "token"] = "bradley_terry"
    compare: Literal["pairs", "all"] = "pairs"
    head_learning_rate: float | None = None
    normalize_rows: int = 256
    optimizer: OptimizerConfig = dataclasses.field(default_factory=lambda: OptimizerConfig(learning_rate=1e-5))

    def __post_init__(self) -> None:
        if self.loss == "token" and self.compare == "all":
            raise ValueError(
                'config.reward_training: loss="token" compares the two answers of a pair, token by token; '
                'compare="all" is for loss="bradley_terry".'
            )
