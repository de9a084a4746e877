"""The settings of a model: its checkpoint, and how it runs."""

import dataclasses
from typing import Literal

from jax_rlhf.models.options import AttentionForm, RematPolicy


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Where one model comes from, and how it runs.

    A reference or critic without a path, which starts as another model, has these three as set for it, and where they
    are None, as config.model has them.
    """

    path: str | None = None
    """The checkpoint: a folder, a .gguf file or a hub id; None = another model's, or none."""
    revision: str | None = None
    """The revision of a hub id."""
    trainable_layers: int | None = None
    """How many layers train, counted from the top; None = all parameters train. Of the actor and the critic; reference
    and reward model are frozen."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """"float32" or "bfloat16", of computing and of saved models; None = bfloat16 on GPU and TPU, float32 on CPU."""
    remat: RematPolicy | None = None
    """What the backward pass computes again: "none", "full" or "dots"; None = "dots" on CPU, as fast as "none" in
    less memory, else "full"."""
    attention: AttentionForm | None = None
    """"xla", or "flash": cuDNN's or splash, which keep no T × T scores, on GPU and TPU; None = "xla"."""
