"""The settings of an optimizer."""

import dataclasses
from typing import Literal

from jax_rlhf.settings import check_ranges


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with a learning rate schedule."""

    learning_rate: float = 1e-5
    """The peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """The learning rate after warm-up: "constant", or a "linear" or "cosine" decay to `final_fraction`."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up. The first has rate learning_rate / warmup_steps, so no step has rate 0."""
    total_steps: int | None = None
    """The step (iterations × epochs × minibatches) at which "linear" and "cosine" end; None = the phase's last step,
    for phases of `python -m jax_rlhf`. Skipped steps (not finite, or beyond `target_kl`) count too. The actor's
    steps are counted from the end of the critic's warm-up."""
    final_fraction: float = 0.0
    """The final learning rate, as a fraction of `learning_rate`."""
    beta1: float = 0.9
    """Decay of Adam's first moment."""
    beta2: float = 0.95
    """Decay of Adam's second moment."""
    eps: float = 1e-8
    """Adam's ε."""
    eps_form: Literal["pytorch", "tensorflow"] = "pytorch"
    """"pytorch": m̂ / (√v̂ + ε); "tensorflow": ε outside the bias correction, m̂ / (√v̂ + ε / √(1 − β₂ᵗ)), with
    smaller first steps if gradients are tiny."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; norms and biases have none."""
    max_grad_norm: float | None = 1.0
    """Clips the global norm of the gradient to this; None = no clipping."""
    first_moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """The dtype of Adam's first moment; "bfloat16" saves 2 bytes per parameter."""

    def __post_init__(self) -> None:
        check_ranges(
            self,
            above_0=("max_grad_norm",),
            at_least_1=("total_steps",),
            at_least_0=("learning_rate", "warmup_steps", "final_fraction", "beta1", "beta2", "eps", "weight_decay"),
        )
        if self.schedule not in ("constant", "linear", "cosine"):
            raise ValueError(f'schedule={self.schedule!r}; it must be "constant", "linear" or "cosine".')
        if self.eps_form not in ("pytorch", "tensorflow"):
            raise ValueError(f'eps_form={self.eps_form!r}; it must be "pytorch" or "tensorflow".')

    def with_end(self, steps: int) -> "OptimizerConfig":
        """The settings, with a schedule that ends after `steps` unless `total_steps` is set."""
        return self if self.total_steps else dataclasses.replace(self, total_steps=steps)
