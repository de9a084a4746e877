"""One optimizer step on a batch, for the SFT and the reward phase: gradients summed over microbatches, then a step.

A loss gives the sum of what it measures over a microbatch's rows, and how many it summed; sums are divided once, by the
count of the whole batch, so that splitting rows over microbatches or devices does not change the gradient.
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

from jax_rlhf.data import real_tokens
from jax_rlhf.hub import Pretrained
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
"""(network, params, batch) → sums over the batch: "loss", "count", and others to report."""


class SupervisedState(struct.PyTreeNode):
    """What a phase carries from step to step.

    Attributes:
      trainable: the parameters that train, float32.
      optimizer: the optax state.
      step: steps done.
      skipped_updates: steps left out since something was not finite.
      bad_steps: such steps in a row.
    """

    trainable: Params
    optimizer: Any
    step: Int32[Array, ""]
    skipped_updates: Int32[Array, ""]
    bad_steps: Int32[Array, ""]


@dataclasses.dataclass(frozen=True)
class Supervised:
    """How a phase trains: hashable, a static argument.

    Attributes:
      network: the model.
      loss: what to minimise.
      optimizer: its settings.
      head_learning_rate: of a scalar head; None = as all else.
      microbatches: parts of a batch whose activations exist one after the other.
    """

    network: SplitModel
    loss: Loss
    optimizer: OptimizerConfig
    head_learning_rate: float | None = None
    microbatches: int = 1


def create_state(
    how: Supervised, pretrained: Pretrained, mesh: Mesh | Layout | None = None
) -> tuple[SupervisedState, Params]:
    """Splits a model's parameters, and makes the optimizer's state for those that train.

    Args:
      how: what and how.
      pretrained: the model; its frozen parameters are shared where they are not too wide, the others copied.
      mesh: where they are; None = one device.

    Returns:
      (state, frozen parameters).
    """
    params, create = split_params(how, pretrained.params), functools.partial(_create, how)
    layout = as_layout(mesh)
    if layout is None:
        return jax.jit(create)(params.trainable), params.frozen
    shardings = state_shardings(how, params.trainable, layout)
    return jax.jit(create, out_shardings=shardings)(params.trainable), params.frozen


def split_params(how: Supervised, params: Params) -> SplitParams:
    """A model's parameters: those that train, and those that do not, in no wider a dtype than they are computed in.

    Args:
      how: what and how.
      params: the whole model's.

    Returns:
      Both parts.
    """
    parts = how.network.split(params)
    return parts.replace(frozen=narrowed(parts.frozen, how.network.compute_dtypes().frozen))


def state_shardings(how: Supervised, trainable: Params, layout: Layout) -> SupervisedState:
    """Where the state goes.

    Args:
      how: what and how.
      trainable: the parameters that train: arrays, or shapes with shardings.
      layout: the mesh.

    Returns:
      Shardings, in the tree of the state.
    """
    shapes, everywhere = abstract_state(how, trainable), layout.sharding(())
    return jax.tree.map(lambda _: everywhere, shapes).replace(
        trainable=jax.tree.map(lambda leaf: leaf.sharding, trainable),
        optimizer=moment_shardings(_optimizer(how), shapes.optimizer, trainable, everywhere),
    )


def abstract_state(how: Supervised, trainable: Params) -> SupervisedState:
    """The state's shapes.

    Args:
      how: what and how.
      trainable: the parameters that train, or their shapes.

    Returns:
      `jax.ShapeDtypeStruct`s, without shardings.
    """
    return jax.eval_shape(functools.partial(_create, how), trainable)


def _create(how: Supervised, trainable: Params) -> SupervisedState:
    masters = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), trainable)
    return SupervisedState(masters, _optimizer(how).init(masters), jnp.int32(0), jnp.int32(0), jnp.int32(0))


def update(
    how: Supervised, state: SupervisedState, frozen: Params, batch: Any
) -> tuple[SupervisedState, dict[str, Float32[Array, ""] | Int32[Array, ""]]]:
    """One optimizer step; the state is donated, but for where NaNs are looked for (`jax_debug_nans`).

    Args:
      how: what and how.
      state: what changes.
      frozen: what does not.
      batch: rows; a multiple of the microbatches.

    Returns:
      (state, metrics): the loss's means, the gradient's norm, the learning rate, the batch's tokens.
    """
    # JAX's NaN checks run a program again to find the place, and must find its arguments.
    debug = jax.config.jax_debug_nans  # pyright: ignore[reportAttributeAccessIssue] -- JAX adds its flags at run time
    run = _step_kept if debug else step
    return run(how, shardings_of(state), state, frozen, batch)


def evaluate(how: Supervised, state: SupervisedState, frozen: Params, batch: Any) -> Sums:
    """The loss's sums over a batch, a microbatch after the other.

    Args:
      how: what and how.
      state: the parameters.
      frozen: the frozen ones.
      batch: rows.

    Returns:
      The loss's sums.
    """
    return evaluation_sums(how.network, how.loss, how.microbatches, state.trainable, frozen, batch)


@functools.partial(model_jit, static_argnums=(0, 1, 2))
def evaluation_sums(
    network: SplitModel, loss: Loss, microbatches: int, trainable: Params, frozen: Params, batch: Any
) -> Sums:
    """`evaluate`, jitted: arguments as there, each of `how`'s that it takes by itself."""
    params = SplitParams(frozen, trainable)
    parts = split_row_groups(batch, microbatches, network.model.config.layout)
    return accumulate(lambda part: loss(network, params, part), parts)


@functools.partial(model_jit, static_argnums=(0, 1), donate_argnums=2)
def step(
    how: Supervised, shardings: tuple, state: SupervisedState, frozen: Params, batch: Any
) -> tuple[SupervisedState, dict[str, Float32[Array, ""] | Int32[Array, ""]]]:
    """`update`, with the shardings that the state comes out in."""

    def gradients(part: Any) -> tuple[Params, Sums]:
        def total(trainable: Params) -> tuple[Float32[Array, ""], Sums]:
            sums = how.loss(how.network, SplitParams(frozen, trainable), part)
            return sums["loss"], sums

        (_, sums), gradient = jax.value_and_grad(total, has_aux=True)(state.trainable)
        return how.network.constrain(gradient), sums

    gradient, sums = accumulate(gradients, split_row_groups(batch, how.microbatches, how.network.model.config.layout))
    count = jnp.maximum(sums["count"], 1)
    gradient = jax.tree.map(lambda leaf: leaf / count, gradient)
    norm = optax.tree.norm(gradient)
    finite = jnp.isfinite(norm) & jnp.isfinite(sums["loss"])
    trainable, optimizer, learning_rate = optimizer_step(
        how.optimizer,
        gradient,
        state.optimizer,
        state.trainable,
        take=finite,
        step=state.step,
        head_learning_rate=how.head_learning_rate,
    )
    bad_steps = jnp.where(finite, 0, state.bad_steps + 1)
    metrics = {name: value / count for name, value in sums.items() if name != "count"} | {
        "count": sums["count"],
        "tokens": real_tokens(batch),
        "grad_norm": norm,
        "lr": learning_rate,
        "skipped_updates": (state.skipped_updates + ~finite).astype(jnp.float32),
        "bad_steps": bad_steps.astype(jnp.float32),
    }
    state = SupervisedState(trainable, optimizer, state.step + 1, state.skipped_updates + ~finite, bad_steps)
    return constrain_to(state, shardings), metrics


_step_kept = model_jit(step.__wrapped__, static_argnums=(0, 1))


def _optimizer(how: Supervised) -> optax.GradientTransformation:
    return create_optimizer(how.optimizer, head_learning_rate=how.head_learning_rate)
