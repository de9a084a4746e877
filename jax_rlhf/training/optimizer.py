"""AdamW with a schedule and gradient clipping, from optax."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """One optimizer; actor and critic each have one.

    Attributes:
      learning_rate: the highest that the schedule reaches.
      schedule: after the warm-up "constant", or down to `final_fraction` "linear" or as a "cosine".
      warmup_steps: optimizer steps from learning_rate / warmup_steps up; no step has rate 0.
      total_steps: optimizer steps (iterations × epochs × minibatches) at which "linear" and "cosine" end.
      final_fraction: of learning_rate, where they end.
      beta1, beta2: decay of Adam's moments.
      eps: Adam's ε.
      eps_form: "pytorch": m̂ / (√v̂ + ε); "tensorflow": ε outside the bias correction, m̂ / (√v̂ + ε / √(1 − β₂ᵗ)), which
        takes smaller first steps where gradients are tiny.
      weight_decay: decoupled, on matrices only (not norms and biases).
      max_grad_norm: clips the gradient's global norm; None = never.
    """

    learning_rate: float = 1e-5
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    total_steps: int | None = None
    final_fraction: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    eps_form: Literal["pytorch", "tensorflow"] = "pytorch"
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0

    def __post_init__(self) -> None:
        if self.schedule not in ("constant", "linear", "cosine"):
            raise ValueError(
                f'schedule={self.schedule!r}; "constant", "linear" and "cosine" are the schedules there are.'
            )
        if self.eps_form not in ("pytorch", "tensorflow"):
            raise ValueError(f'eps_form={self.eps_form!r}; "pytorch" and "tensorflow" are the forms there are.')
        if self.schedule != "constant" and (self.total_steps or 0) <= self.warmup_steps:
            raise ValueError(
                f'schedule="{self.schedule}" needs total_steps above warmup_steps={self.warmup_steps}, '
                f"not {self.total_steps}."
            )


def learning_rate_schedule(config: OptimizerConfig) -> optax.Schedule:
    """The learning rate as a function of the optimizer step, counted from 0.

    Args:
      config: its fields.

    Returns:
      An optax schedule.
    """
    peak, steps = config.learning_rate, (config.total_steps or 0) - config.warmup_steps
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, peak * config.final_fraction, steps),
        "cosine": lambda: optax.cosine_decay_schedule(peak, steps, config.final_fraction),
    }[config.schedule]()
    if not config.warmup_steps:
        return after
    first = peak / config.warmup_steps
    warmup = optax.linear_schedule(first, peak, max(config.warmup_steps - 1, 1))
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def create_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clip by global norm → Adam → decoupled weight decay → learning rate.

    Args:
      config: its fields.

    Returns:
      An optax transformation.

    Source: Kingma & Ba 2015; Loshchilov & Hutter 2019.
    """
    adam = optax.scale_by_adam if config.eps_form == "pytorch" else scale_by_tensorflow_adam
    parts = [adam(config.beta1, config.beta2, config.eps)]
    if config.max_grad_norm is not None:
        parts.insert(0, optax.clip_by_global_norm(config.max_grad_norm))
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=decayed))
    return optax.chain(*parts, optax.scale_by_learning_rate(learning_rate_schedule(config)))


def decayed(params: optax.Params) -> optax.Params:
    """Which parameters weight decay applies to: kernels and tables, not norm scales and biases.

    Args:
      params: nested dicts.

    Returns:
      The same tree of bools.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ("scale", "bias"), params)


def scale_by_tensorflow_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam as TensorFlow 1 had it: √(1 − β₂ᵗ) / (1 − β₁ᵗ) · m / (√v + ε), ε not divided by the bias correction.

    Args:
      b1, b2: decay of the moments.
      eps: ε.

    Returns:
      An optax transformation.

    Source: Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO", detail on Adam's ε.
    """
    plain = optax.scale_by_adam(b1, b2, eps)

    def update(
        updates: optax.Updates, state: optax.ScaleByAdamState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.ScaleByAdamState]:
        _, state = plain.update(updates, state, params)  # the moments; its own direction is unused and compiled away
        count = state.count.astype(jnp.float32)
        scale = jnp.sqrt(1 - b2**count) / (1 - b1**count)

        def direction(mean: Array, square: Array) -> Array:
            return scale * mean / (jnp.sqrt(square) + eps)

        return jax.tree.map(direction, state.mu, state.nu), state

    return optax.GradientTransformation(plain.init, update)
