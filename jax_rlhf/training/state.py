"""What the trainer carries from iteration to iteration, beside the models."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from jax_rlhf.parallel import Layout
from jax_rlhf.rl import AdaptiveKL, AdaptivePenalty, FixedKL
from jax_rlhf.training.config import PPOConfig
from jax_rlhf.training.networks import Trained
from jax_rlhf.training.optimizer import create_optimizer, moment_places


@struct.dataclass
class PPOState:
    """Optimizer states, controllers and counters.

    Attributes:
      actor_optimizer, critic_optimizer: optax states.
      kl: the KL controller.
      penalty: the controller of PPO-penalty's β.
      iteration: int32[], iterations done.
      skipped_updates: int32[], optimizer steps left out since something was not finite.
      bad_steps: int32[], iterations in a row that had such a step.
      lr_scale: float32[], what the actor's learning rate is multiplied by: 1 until a limit lowers it.
      entropy: float32[], of the actor on the last minibatch, in nats per token; 0 before the first.
    """

    actor_optimizer: Any
    critic_optimizer: Any
    kl: FixedKL | AdaptiveKL
    penalty: AdaptivePenalty
    iteration: Array
    skipped_updates: Array
    bad_steps: Array
    lr_scale: Array
    entropy: Array


def create_state(config: PPOConfig, trained: Trained, layout: Layout | None = None) -> PPOState:
    """The state before the first iteration.

    Args:
      config: PPO's.
      trained: the parameters that will train.
      layout: where they are; None = one device. An optimizer's moments lie as their parameters do, all else is on every
        device.

    Returns:
      The state.
    """
    create = functools.partial(_create, config)
    if layout is None:  # held to their device, as an update leaves it: else the next one would compile anew
        return jax.device_put(jax.jit(create)(trained), jax.tree.leaves(trained.actor)[0].sharding)
    return jax.jit(create, out_shardings=state_places(config, trained, layout))(trained)


def state_places(config: PPOConfig, trained: Trained, layout: Layout) -> PPOState:
    """Where the state goes.

    Args:
      config: PPO's.
      trained: the parameters that will train: arrays, or shapes with shardings.
      layout: the mesh.

    Returns:
      Shardings, in the tree of the state.
    """
    shapes, everywhere = abstract_state(config, trained), layout.sharding(())
    places = jax.tree.map(lambda _: everywhere, shapes)
    for name in ("actor", "critic"):
        optimizer, state = create_optimizer(getattr(config, f"{name}_optimizer")), getattr(shapes, f"{name}_optimizer")
        moments = moment_places(optimizer, state, getattr(trained, name), everywhere)
        places = places.replace(**{f"{name}_optimizer": moments})
    return places


def abstract_state(config: PPOConfig, trained: Trained) -> PPOState:
    """The state's shapes.

    Args:
      config: PPO's.
      trained: the parameters that will train, or their shapes.

    Returns:
      `jax.ShapeDtypeStruct`s, without shardings.
    """
    return jax.eval_shape(functools.partial(_create, config), trained)


def _create(config: PPOConfig, trained: Trained) -> PPOState:
    beta = jnp.float32(config.kl_coef)
    kl = FixedKL(beta)
    if config.kl_target is not None:
        kl = AdaptiveKL(beta, jnp.float32(config.kl_target), jnp.float32(config.kl_horizon))
    return PPOState(
        actor_optimizer=create_optimizer(config.actor_optimizer).init(trained.actor),
        critic_optimizer=create_optimizer(config.critic_optimizer).init(trained.critic),
        kl=kl,
        penalty=AdaptivePenalty(jnp.float32(config.penalty_coef), jnp.float32(config.penalty_target)),
        iteration=jnp.int32(0),
        skipped_updates=jnp.int32(0),
        bad_steps=jnp.int32(0),
        lr_scale=jnp.float32(1),
        entropy=jnp.float32(0),
    )
