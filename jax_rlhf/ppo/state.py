"""The training state besides the models: optimizer states, coefficients and counters."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jaxtyping import Bool, Float32, Int32

from jax_rlhf.models.decoder import Params
from jax_rlhf.optim.optimizer import create_optimizer, moment_shardings, optimizer_step
from jax_rlhf.parallel import Layout
from jax_rlhf.ppo.config import PPOConfig
from jax_rlhf.ppo.models import Trainable
from jax_rlhf.rl import AdaptiveKL, AdaptivePenalty, FixedKL


class PPOState(struct.PyTreeNode):
    """Optimizer states, controllers and counters.

    Attributes:
      actor_optimizer, critic_optimizer: optax states.
      kl: the KL controller.
      penalty: the controller of PPO-penalty's β.
      iteration: iterations done.
      skipped_updates: optimizer steps skipped because a loss, gradient or score was not finite.
      bad_steps: consecutive iterations with at least one skipped step.
      lr_scale: factor on the actor's learning rate: 1 until a limit lowers it.
      entropy: the actor's on the last minibatch, in nats per token; 0 before the first minibatch.
    """

    actor_optimizer: Any
    critic_optimizer: Any
    kl: FixedKL | AdaptiveKL
    penalty: AdaptivePenalty
    iteration: Int32[Array, ""]
    skipped_updates: Int32[Array, ""]
    bad_steps: Int32[Array, ""]
    lr_scale: Float32[Array, ""]
    entropy: Float32[Array, ""]

    def adapt_kl(self, kl: Float32[Array, ""], episodes: int, moved: Bool[Array, ""]) -> "PPOState":
        """Adapts the KL coefficient if the actor was updated (`moved`); kl: in nats per response."""
        return self.replace(kl=_where(moved, self.kl.update(kl, episodes), self.kl))

    def adapt_penalty(self, kl: Float32[Array, ""], moved: Bool[Array, ""]) -> "PPOState":
        """Adapts PPO-penalty's β if the actor was updated (`moved`); kl: k3(old ‖ new), in nats per token."""
        return self.replace(penalty=_where(moved, self.penalty.update(kl), self.penalty))

    def apply_limits(
        self, config: PPOConfig, metrics: dict[str, Float32[Array, ""]]
    ) -> tuple["PPOState", dict[str, Float32[Array, ""]]]:
        """Compares metrics with the limits, and lowers the learning rate if one is exceeded and the config says so.

        Returns:
          (state, metrics). "limit/kl" and "limit/ratio" are 1 if the limit is exceeded, for the run to stop.
        """
        state, limits = self, {}
        if config.limits.kl is not None:
            limits["limit/kl"] = metrics["objective/kl"] > config.limits.kl
        if config.limits.ratio is not None:  # 2 or more; as ρ > 0, a gap above 1 means ρ = gap + 1
            limits["limit/ratio"] = metrics["val/largest_ratio_gap"] + 1 > config.limits.ratio
        if limits and config.limits.action == "lower_lr":
            exceeded = jnp.any(jnp.stack(list(limits.values())))
            scale = jnp.where(exceeded, self.lr_scale * config.limits.lr_factor, self.lr_scale)
            state, limits["limit/lr_scale"] = self.replace(lr_scale=scale), scale
        return state, {name: value.astype(jnp.float32) for name, value in limits.items()}


def _where(condition: Bool[Array, ""], chosen: Any, other: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), chosen, other)


def take_step(
    config: PPOConfig,
    trainable: Trainable,
    state: PPOState,
    gradients: Mapping[str, Params],
    *,
    take: Bool[Array, ""],
    step: Int32[Array, ""],
) -> tuple[Trainable, PPOState, tuple[Float32[Array, ""], Float32[Array, ""]]]:
    """One optimizer step of the actor and one of the critic.

    The learning rate depends on the position of the step in the run (iteration, epoch, minibatch), not on the number
    of updates taken. Otherwise skipped steps, early stops and the critic's warm-up would delay the schedule, and the
    run would end before the schedule does.

    Args:
      config: PPO's.
      trainable: the parameters.
      state: with the optimizers' states.
      gradients: "actor" and "critic".
      take: False skips both steps.
      step: counted from 0 within the iteration.

    Returns:
      (trainable, state, learning rates of actor and critic).
    """
    per_iteration, warmup = config.ppo_epochs * config.num_minibatches, config.critic.warmup_iterations
    learn_actor, scale = state.iteration >= warmup, state.lr_scale if config.limits.action == "lower_lr" else 1.0
    actor, actor_optimizer, actor_lr = optimizer_step(
        config.actor.optimizer,
        gradients["actor"],
        state.actor_optimizer,
        trainable.actor,
        take=take & learn_actor,
        step=jnp.maximum(state.iteration - warmup, 0) * per_iteration + step,
        scale=scale,
    )
    critic, critic_optimizer, critic_lr = optimizer_step(
        config.critic.optimizer,
        gradients["critic"],
        state.critic_optimizer,
        trainable.critic,
        take=take,
        step=state.iteration * per_iteration + step,
    )
    state = state.replace(actor_optimizer=actor_optimizer, critic_optimizer=critic_optimizer)
    rates = jnp.where(learn_actor, actor_lr, 0), critic_lr
    return trainable.replace(actor=actor, critic=critic), state, rates


def entropy_coef(config: PPOConfig, state: PPOState) -> Float32[Array, ""] | float:
    """The coefficient of the entropy bonus, per nat: 0 if the last minibatch's entropy was at or above the target.

    Source: He et al. 2025, "Skywork Open Reasoner 1 Technical Report" (adaptive entropy control).
    """
    if config.loss.entropy_target is None:
        return config.loss.entropy_coef
    return jnp.where(state.entropy < config.loss.entropy_target, config.loss.entropy_coef, 0.0)


def create_state(config: PPOConfig, trainable: Trainable, layout: Layout | None = None) -> PPOState:
    """The state before the first iteration.

    Args:
      config: PPO's.
      trainable: the parameters that will train.
      layout: the mesh; None = one device. Optimizer moments are sharded like their parameters, all else is replicated.
    """
    create = functools.partial(_create, config)
    if layout is None:  # committed to the device, as an update returns it: otherwise the second update would recompile
        return jax.device_put(jax.jit(create)(trainable), jax.tree.leaves(trainable.actor)[0].sharding)
    return jax.jit(create, out_shardings=state_shardings(config, trainable, layout))(trainable)


def state_shardings(config: PPOConfig, trainable: Trainable, layout: Layout) -> PPOState:
    """The shardings of the state, in a tree of the state's structure.

    Args:
      config: PPO's.
      trainable: the parameters that will train: arrays, or shapes with shardings.
      layout: the mesh.
    """
    shapes, replicated = abstract_state(config, trainable), layout.sharding(())
    shardings = jax.tree.map(lambda _: replicated, shapes)
    for name in ("actor", "critic"):
        optimizer, state = create_optimizer(getattr(config, name).optimizer), getattr(shapes, f"{name}_optimizer")
        moments = moment_shardings(optimizer, state, getattr(trainable, name), replicated)
        shardings = shardings.replace(**{f"{name}_optimizer": moments})
    return shardings


def abstract_state(config: PPOConfig, trainable: Trainable) -> PPOState:
    """The state as `jax.ShapeDtypeStruct`s without shardings; `trainable` may consist of shapes, too."""
    return jax.eval_shape(functools.partial(_create, config), trainable)


def _create(config: PPOConfig, trainable: Trainable) -> PPOState:
    beta = jnp.float32(config.kl.coef)
    kl = FixedKL(beta)
    if config.kl.target is not None:
        kl = AdaptiveKL(beta, jnp.float32(config.kl.target), jnp.float32(config.kl.horizon))
    return PPOState(
        actor_optimizer=create_optimizer(config.actor.optimizer).init(trainable.actor),
        critic_optimizer=create_optimizer(config.critic.optimizer).init(trainable.critic),
        kl=kl,
        penalty=AdaptivePenalty(jnp.float32(config.loss.penalty_coef), jnp.float32(config.loss.penalty_target)),
        iteration=jnp.int32(0),
        skipped_updates=jnp.int32(0),
        bad_steps=jnp.int32(0),
        lr_scale=jnp.float32(1),
        entropy=jnp.float32(0),
    )
