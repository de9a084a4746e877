"""The optimizer step of the SFT and reward phases: accumulate gradients over microbatches, then update.

A loss returns sums over the rows of a microbatch and the count of what it summed. Sums are divided once, by the count
of the whole batch, so the gradient does not depend on how rows are split over microbatches or devices.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float32, Int32

from jax_rlhf.models import model_jit, narrowed
from jax_rlhf.models.decoder import Params
from jax_rlhf.models.split import SplitModel, SplitParams
from jax_rlhf.optim.microbatches import accumulate
from jax_rlhf.optim.optimizer import (
    OptimizerConfig,
    create_optimizer,
    moment_shardings,
    optimizer_step,
)
from jax_rlhf.parallel import Layout, as_layout, constrain_to, shardings_of, split_row_groups

Sums = dict[str, Float32[Array, ""]]
Loss = Callable[[SplitModel, SplitParams, Any], Sums]
"""(network, params, batch) → sums over the batch: "loss", "count", and other metrics."""


class SupervisedState(struct.PyTreeNode):
    """The training state of a phase.

    Attributes:
      trainable: the trainable parameters, float32.
      optimizer: the optax state.
      step: steps done, skipped ones included.
      skipped_updates: steps skipped because the loss or a gradient was not finite.
      bad_steps: consecutive skipped steps.
    """

    trainable: Params
    optimizer: Any
    step: Int32[Array, ""]
    skipped_updates: Int32[Array, ""]
    bad_steps: Int32[Array, ""]


@dataclasses.dataclass(frozen=True)
class TrainingSpec:
    """The static description of a supervised phase: hashable, a static argument of jitted functions.

    Attributes:
      network: the model.
      loss: the loss to minimise.
      optimizer: the optimizer's settings.
      head_learning_rate: peak learning rate of a scalar head; None = optimizer.learning_rate.
      microbatches: number of microbatches per batch.
    """

    network: SplitModel
    loss: Loss
    optimizer: OptimizerConfig
    head_learning_rate: float | None = None
    microbatches: int = 1


def create_state(
    spec: TrainingSpec, params: Params, mesh: Mesh | Layout | None = None
) -> tuple[SupervisedState, Params]:
    """Splits a model's parameters into trainable and frozen, and creates the optimizer's state.

    Args:
      spec: the phase.
      params: the model's. Trainable ones are copied. Frozen ones are shared, or cast to the dtype that they are
        computed in if that is narrower.
      mesh: the mesh; None = one device.

    Returns:
      (state, frozen parameters).
    """
    parts, create = split_params(spec, params), functools.partial(_create, spec)
    layout = as_layout(mesh)
    if layout is None:
        return jax.jit(create)(parts.trainable), parts.frozen
    shardings = state_shardings(spec, parts.trainable, layout)
    return jax.jit(create, out_shardings=shardings)(parts.trainable), parts.frozen


def split_params(spec: TrainingSpec, params: Params) -> SplitParams:
    """Splits a model's parameters; casts frozen ones to the dtype that they are computed in, if that is narrower."""
    parts = spec.network.split(params)
    return parts.replace(frozen=narrowed(parts.frozen, spec.network.compute_dtypes().frozen))


def state_shardings(spec: TrainingSpec, trainable: Params, layout: Layout) -> SupervisedState:
    """The shardings of the state, in a tree of the state's structure.

    Args:
      spec: the phase.
      trainable: the trainable parameters: arrays, or shapes with shardings.
      layout: the mesh.
    """
    shapes, replicated = abstract_state(spec, trainable), layout.sharding(())
    return jax.tree.map(lambda _: replicated, shapes).replace(
        trainable=jax.tree.map(lambda leaf: leaf.sharding, trainable),
        optimizer=moment_shardings(_optimizer(spec), shapes.optimizer, trainable, replicated),
    )


def abstract_state(spec: TrainingSpec, trainable: Params) -> SupervisedState:
    """The state as `jax.ShapeDtypeStruct`s without shardings; `trainable` may consist of shapes, too."""
    return jax.eval_shape(functools.partial(_create, spec), trainable)


def _create(spec: TrainingSpec, trainable: Params) -> SupervisedState:
    weights = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), trainable)
    return SupervisedState(weights, _optimizer(spec).init(weights), jnp.int32(0), jnp.int32(0), jnp.int32(0))


def update(
    spec: TrainingSpec, state: SupervisedState, frozen: Params, batch: Any
) -> tuple[SupervisedState, dict[str, Float32[Array, ""] | Int32[Array, ""]]]:
    """One optimizer step; the state is donated unless `jax_debug_nans` is set.

    Args:
      spec: the phase.
      state: the state before the step.
      frozen: the frozen parameters.
      batch: its number of rows is a multiple of the number of microbatches.

    Returns:
      (state, metrics): means of the loss's sums, gradient norm, learning rate, tokens in the batch, skipped steps.
    """
    # JAX's NaN check reruns a program to locate the NaN, and needs its arguments intact.
    debug = jax.config.jax_debug_nans  # pyright: ignore[reportAttributeAccessIssue] -- JAX adds its flags at run time
    run = _step_without_donation if debug else step
    return run(spec, shardings_of(state), state, frozen, batch)


def evaluate(spec: TrainingSpec, state: SupervisedState, frozen: Params, batch: Any) -> Sums:
    """The loss's sums over a batch, microbatch by microbatch."""
    return evaluation_sums(spec.network, spec.loss, spec.microbatches, state.trainable, frozen, batch)


@functools.partial(model_jit, static_argnums=(0, 1, 2))
def evaluation_sums(
    network: SplitModel, loss: Loss, microbatches: int, trainable: Params, frozen: Params, batch: Any
) -> Sums:
    """`evaluate`, jitted; takes fields of `TrainingSpec` and of the state as separate arguments."""
    params = SplitParams(frozen, trainable)
    parts = split_row_groups(batch, microbatches, network.model.config.layout)
    return accumulate(lambda part: loss(network, params, part), parts)


@functools.partial(model_jit, static_argnums=(0, 1), donate_argnums=2)
def step(
    spec: TrainingSpec, shardings: tuple, state: SupervisedState, frozen: Params, batch: Any
) -> tuple[SupervisedState, dict[str, Float32[Array, ""] | Int32[Array, ""]]]:
    """`update`, jitted; shardings: those of the new state."""

    def gradients(part: Any) -> tuple[Params, Sums]:
        def total(trainable: Params) -> tuple[Float32[Array, ""], Sums]:
            sums = spec.loss(spec.network, SplitParams(frozen, trainable), part)
            return sums["loss"], sums

        (_, sums), gradient = jax.value_and_grad(total, has_aux=True)(state.trainable)
        return spec.network.constrain(gradient), sums

    gradient, sums = accumulate(gradients, split_row_groups(batch, spec.microbatches, spec.network.model.config.layout))
    count = jnp.maximum(sums["count"], 1)
    gradient = jax.tree.map(lambda leaf: leaf / count, gradient)
    norm = optax.tree.norm(gradient)
    finite = jnp.isfinite(norm) & jnp.isfinite(sums["loss"])
    trainable, optimizer, learning_rate = optimizer_step(
        spec.optimizer,
        gradient,
        state.optimizer,
        state.trainable,
        take=finite,
        step=state.step,
        head_learning_rate=spec.head_learning_rate,
    )
    bad_steps = jnp.where(finite, 0, state.bad_steps + 1)
    metrics = {name: value / count for name, value in sums.items() if name != "count"} | {
        "count": sums["count"],
        "tokens": batch.real_tokens(),
        "grad_norm": norm,
        "lr": learning_rate,
        "skipped_updates": (state.skipped_updates + ~finite).astype(jnp.float32),
        "bad_steps": bad_steps.astype(jnp.float32),
    }
    state = SupervisedState(trainable, optimizer, state.step + 1, state.skipped_updates + ~finite, bad_steps)
    return constrain_to(state, shardings), metrics


_step_without_donation = model_jit(step.__wrapped__, static_argnums=(0, 1))


def _optimizer(spec: TrainingSpec) -> optax.GradientTransformation:
    return create_optimizer(spec.optimizer, head_learning_rate=spec.head_learning_rate)
