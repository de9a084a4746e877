"""The settings of an optimizer."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with a schedule."""

    learning_rate: float = 1e-5
    """The highest learning rate of the schedule."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """The learning rate after the warm-up: "constant", or down to `final_fraction` "linear" or as a "cosine"."""
    warmup_steps: int = 0
    """Optimizer steps over which the rate rises from learning_rate / warmup_steps; no step has rate 0."""
    total_steps: int | None = None
    """Steps (iterations × epochs × minibatches) at which "linear" and "cosine" end; None = the phase's last one,
    where `python -m jax_rlhf` trains. Steps that are left out (not finite, past `target_kl`) count too. The
    actor's are counted from the end of the critic's warm-up."""
    final_fraction: float = 0.0
    """Where the schedule ends, as a fraction of `learning_rate`."""
    beta1: float = 0.9
    """Decay of Adam's first moment."""
    beta2: float = 0.95
    """Decay of Adam's second moment."""
    eps: float = 1e-8
    """Adam's ε."""
    eps_form: Literal["pytorch", "tensorflow"] = "pytorch"
    """"pytorch": m̂ / (√v̂ + ε); "tensorflow": ε outside the bias correction, m̂ / (√v̂ + ε / √(1 − β₂ᵗ)), which
    takes smaller first steps where gradients are tiny."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only (not norms and biases)."""
    max_grad_norm: float | None = 1.0
    """Clips the gradient's global norm; None = never."""
    first_moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """The dtype of Adam's first moment; "bfloat16" saves 2 bytes per parameter."""

    def __post_init__(self) -> None:
        if self.schedule not in ("constant", "linear", "cosine"):
            raise ValueError(
                f'schedule={self.schedule!r}; "constant", "linear" and "cosine" are the schedules there are.'
            )
        if self.eps_form not in ("pytorch", "tensorflow"):
            raise ValueError(f'eps_form={self.eps_form!r}; "pytorch" and "tensorflow" are the forms there are.')

    def with_end(self, steps: int) -> "OptimizerConfig":
        """The settings, whose schedule ends after `steps` where they do not say when."""
        return self if self.total_steps else dataclasses.replace(self, total_steps=steps)
