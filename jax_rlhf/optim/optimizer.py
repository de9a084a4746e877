"""AdamW with a schedule and gradient clipping, from optax."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Bool, Float, Float32, Int, PyTree

from jax_rlhf.optim.config import OptimizerConfig


def learning_rate_schedule(config: OptimizerConfig) -> optax.Schedule:
    """The learning rate as a function of the step, counted from 0.

    Args:
      config: its fields.

    Returns:
      An optax schedule.

    Raises:
      ValueError: a schedule that ends, without total_steps above warmup_steps.
    """
    peak, steps = config.learning_rate, (config.total_steps or 0) - config.warmup_steps
    if config.schedule != "constant" and steps <= 0:
        raise ValueError(
            f'schedule="{config.schedule}" needs total_steps above warmup_steps={config.warmup_steps}, '
            f"not {config.total_steps}."
        )
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


def create_optimizer(
    config: OptimizerConfig, *, head_learning_rate: float | None = None
) -> optax.GradientTransformationExtraArgs:
    """Clip by global norm → Adam → decoupled weight decay → learning rate.

    Args:
      config: its fields.
      head_learning_rate: of a scalar head, whose schedule has the same shape; None = as all else.

    Returns:
      An optax transformation. Its `update` takes the schedule's place as an argument, `step`, and a factor on the
      learning rate, `scale`.

    Source: Kingma & Ba 2015; Loshchilov & Hutter 2019.
    """
    adam = optax.scale_by_adam if config.eps_form == "pytorch" else scale_by_tensorflow_adam
    parts = [adam(config.beta1, config.beta2, config.eps, mu_dtype=jnp.dtype(config.first_moment_dtype))]
    if config.max_grad_norm is not None:
        parts.insert(0, optax.clip_by_global_norm(config.max_grad_norm))
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=decayed))
    if head_learning_rate is not None:
        parts.append(optax.masked(optax.scale(head_learning_rate / config.learning_rate), _of_scalar_head))
    return optax.chain(*parts, _scale_by_learning_rate_at_step(learning_rate_schedule(config)))


def _scale_by_learning_rate_at_step(schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """−schedule(step) · scale · updates.

    The caller names the step. optax's own schedules count the updates that were taken, so that one which ends with the
    phase would not reach its end where updates are left out.
    """

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        step: Int[Array, ""] | int,
        scale: Float[Array, ""] | float = 1.0,
        **_: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        rate = schedule(step) * scale
        return jax.tree.map(lambda leaf: -rate * leaf, updates), state

    # optax types the constructor as that of transformations without more arguments.
    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)  # pyright: ignore[reportArgumentType]


def _of_scalar_head(params: optax.Params) -> optax.Params:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key == "scalar_head", params)


def optimizer_step(
    config: OptimizerConfig,
    gradient: PyTree[Float[Array, "..."]],
    state: optax.OptState,
    params: PyTree[Float[Array, "..."]],
    *,
    take: Bool[Array, ""],
    step: Int[Array, ""],
    scale: Float[Array, ""] | float = 1.0,
    head_learning_rate: float | None = None,
) -> tuple[PyTree[Float[Array, "..."]], optax.OptState, Float32[Array, ""]]:
    """The optimizer's step, or nothing.

    A loop of one turn or none, since XLA changes in place what a loop carries: as `where` over the results, an update
    of a model of 97 million parameters took 680 MB more.

    Args:
      config: the optimizer's settings.
      gradient: of the parameters.
      state: the optimizer's.
      params: the parameters.
      take: whether to step.
      step: of the learning rate's schedule.
      scale: what the learning rate is multiplied by.
      head_learning_rate: as in `create_optimizer`.

    Returns:
      (params, state, learning rate of this step).
    """
    optimizer = create_optimizer(config, head_learning_rate=head_learning_rate)

    def turn(carry: tuple) -> tuple:
        params, state, _ = carry
        updates, state = optimizer.update(gradient, state, params, step=step, scale=scale)
        return optax.apply_updates(params, updates), state, jnp.zeros((), bool)

    params, state, _ = jax.lax.while_loop(lambda carry: carry[2], turn, (params, state, take))
    return params, state, jnp.asarray(learning_rate_schedule(config)(step) * scale, jnp.float32)


def moment_shardings(
    optimizer: optax.GradientTransformation,
    state: optax.OptState,
    params: optax.Params,
    elsewhere: jax.sharding.Sharding,
) -> optax.OptState:
    """Where an optimizer's state goes: moments as their parameters do.

    Args:
      optimizer: the optimizer.
      state: its state's shapes.
      params: the parameters, on their devices.
      elsewhere: where all else goes.

    Returns:
      Shardings, in the tree of the state.
    """
    return optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, param: param.sharding,
        state,
        params,
        transform_non_params=lambda _: elsewhere,
    )


def decayed(params: optax.Params) -> optax.Params:
    """Which parameters weight decay applies to: kernels and tables, not norm scales and biases.

    Args:
      params: nested dicts.

    Returns:
      The same tree of bools.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ("scale", "bias"), params)


def scale_by_tensorflow_adam(
    b1: float, b2: float, eps: float, mu_dtype: jnp.dtype = jnp.float32
) -> optax.GradientTransformation:
    """Adam as TensorFlow 1 had it: √(1 − β₂ᵗ) / (1 − β₁ᵗ) · m / (√v + ε), ε not divided by the bias correction.

    Args:
      b1, b2: decay of the moments.
      eps: ε.
      mu_dtype: of the first moment.

    Returns:
      An optax transformation.

    Source: Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO", detail on Adam's ε.
    """
    plain = optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        _, state = plain.update(updates, state, params)  # the moments; its own direction is unused and compiled away
        assert isinstance(state, optax.ScaleByAdamState)
        count = jnp.asarray(state.count).astype(jnp.float32)
        scale = jnp.sqrt(1 - b2**count) / (1 - b1**count)

        def direction(mean: Float[Array, "*shape"], square: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
            return scale * mean / (jnp.sqrt(square) + eps)

        return jax.tree.map(direction, state.mu, state.nu), state

    return optax.GradientTransformation(plain.init, update)
