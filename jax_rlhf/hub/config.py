"""The settings of a model: its checkpoint, and how it runs."""

import dataclasses
from typing import Literal

from jax_rlhf.models.options import AttentionForm, RematPolicy


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The checkpoint of one model, and how the model runs.

    A reference or critic without a path starts as a copy of another model. Its dtype, remat and attention are those set
    for it, or those of config.model where they are None.
    """

    path: str | None = None
    """The checkpoint: a folder, a .gguf file or a hub id; None = the checkpoint of another model, or no model."""
    revision: str | None = None
    """The revision of a hub id."""
    trainable_layers: int | None = None
    """The number of layers that are trained, counted from the top; None = all parameters.
    `model.trainable_layers` is that of SFT and of the actor in PPO, `critic.trainable_layers` is that of the critic.
    The reference and the reward model are frozen, so theirs must be None."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """"float32" or "bfloat16", the dtype of computation and of saved models; None = bfloat16 on GPU and TPU, float32 on
    CPU."""
    remat: RematPolicy | None = None
    """What the backward pass recomputes: "none", "full" or "dots"; None = "dots" on CPU, where it is as fast as "none"
    and needs less memory, and "full" elsewhere."""
    attention: AttentionForm | None = None
    """"xla", or "flash" on GPU (cuDNN) and TPU (splash attention), which stores no T × T scores; None = "xla"."""

    def required_path(self) -> str:
        """`path` of a model that must have one.

        Raises:
          ValueError: it is None.
        """
        if self.path is None:
            raise ValueError(
                "config.model.path is not set; choose a checkpoint with --config.model.path=FOLDER_OR_HUB_ID"
            )
        return self.path
