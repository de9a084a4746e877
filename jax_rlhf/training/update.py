"""The second program of an iteration: epochs × minibatches × microbatches over an experience.

    for epoch:                                  rows in a fresh order
      for minibatch:                            one optimizer step of actor and critic each
        for microbatch:                         Σ of per-token losses / the minibatch's token count
          gradients, added up
        skip if not finite, else step

All three loops are scans, so that the program is as long with 4 × 4 as with 1 × 1. Losses are sums over tokens, divided
by the count of the whole minibatch: splitting rows over microbatches or devices does not change the gradient.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array

from jax_rlhf.models.decoder import Params
from jax_rlhf.models.split import SplitParams
from jax_rlhf.rl import Experience, masked_mean
from jax_rlhf.training.config import PPOConfig
from jax_rlhf.training.metrics import experience_metrics
from jax_rlhf.training.networks import Frozen, Networks, Trained
from jax_rlhf.training.objective import (
    LossWeights,
    PretrainingRows,
    Sums,
    actor_loss,
    critic_loss,
    penalty_kl,
    predicted,
)
from jax_rlhf.training.optimizer import apply_gradient, create_optimizer, learning_rate_schedule
from jax_rlhf.training.state import PPOState


@struct.dataclass
class _Step:
    """What is measured of one minibatch beside its sums.

    Attributes:
      done: bool[], False past `target_kl`, where nothing is computed.
      taken: bool[], whether the parameters moved.
      actor_norm, critic_norm: float32[], of the gradients before clipping.
      actor_lr, critic_lr: float32[], the learning rates of this step.
    """

    done: Array
    taken: Array
    actor_norm: Array
    critic_norm: Array
    actor_lr: Array
    critic_lr: Array


@dataclasses.dataclass(frozen=True)
class _Iteration:
    """What all minibatches of an iteration have in common.

    Attributes:
      networks, config: the models and PPO's settings.
      frozen: parameters that no update changes.
      experience: B rows.
      learn_actor: bool[], False in a warm-up of the critic.
    """

    networks: Networks
    config: PPOConfig
    frozen: Frozen
    experience: Experience
    learn_actor: Array


def ppo_update(
    networks: Networks,
    config: PPOConfig,
    trained: Trained,
    state: PPOState,
    frozen: Frozen,
    experience: Experience,
    pretraining: PretrainingRows | None,
    key: Array,
) -> tuple[Trained, PPOState, dict[str, Array]]:
    """All updates of one iteration.

    Args:
      networks: the models.
      config: PPO's; `microbatch_size` is set.
      trained, state: what changes (donate them).
      frozen: what does not.
      experience: B rows.
      pretraining: rows for the pretraining loss, or None.
      key: of this iteration; addresses the row orders.

    Returns:
      (trained, state, metrics).
    """
    rows = len(experience.tokens)
    per_minibatch = rows // config.num_minibatches
    micro = config.microbatch_size
    chex.assert_is_divisible(rows, config.num_minibatches)
    chex.assert_is_divisible(per_minibatch, micro)
    if pretraining is not None:
        boundary = networks.actor.boundary(SplitParams(frozen.actor, {}), pretraining.tokens, pretraining.mask)
        pretraining = _grouped(pretraining.replace(boundary=boundary), (config.num_minibatches, per_minibatch // micro))
    learn_actor = state.iteration >= config.critic_warmup_iterations
    iteration = _Iteration(networks, config, frozen, experience, learn_actor)
    skipped_before = state.skipped_updates

    def order(epoch: Array) -> Array:
        shuffled = jax.random.permutation(jax.random.fold_in(key, epoch), rows)
        return shuffled.reshape(config.num_minibatches, per_minibatch // micro, micro)

    def minibatch(carry: tuple, inputs: tuple) -> tuple[tuple, tuple[Sums, _Step]]:
        trained, state, stopped = carry
        rows, text, index = inputs
        trained, state, sums, step = _update_minibatch(iteration, trained, state, rows, text, index, stopped)
        if config.target_kl is not None:
            stopped = stopped | (sums.approx_kl > config.target_kl)
        return (trained, state, stopped), (sums, step)

    def epoch(carry: tuple, epoch: Array) -> tuple[tuple, tuple]:
        indices = epoch * config.num_minibatches + jnp.arange(config.num_minibatches)
        return jax.lax.scan(minibatch, carry, (order(epoch), pretraining, indices))

    start = (trained, state, jnp.zeros((), bool))
    (trained, state, _), measured = jax.lax.scan(epoch, start, jnp.arange(config.ppo_epochs))
    sums, steps = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), measured)

    last, bad = order(jnp.int32(config.ppo_epochs - 1))[-1], state.skipped_updates > skipped_before
    state = state.replace(bad_steps=jnp.where(bad, state.bad_steps + 1, 0))
    state, metrics = _finished(iteration, trained, state, sums, steps, last)
    return _with_moving_average(config, trained), state, metrics


def _finished(
    iteration: _Iteration, trained: Trained, state: PPOState, sums: Sums, steps: _Step, last: Array
) -> tuple[PPOState, dict[str, Array]]:
    """Coefficients, limits and metrics after the updates; last int[microbatches, rows each]: the last minibatch's rows.

    The coefficients answer to what the actor did: where it did not move, they rest.
    """
    networks, config, experience = iteration.networks, iteration.config, iteration.experience
    actor_moved = iteration.learn_actor & jnp.any(steps.taken)
    if config.policy_loss == "penalty":
        measure = lambda: penalty_kl(networks, config, trained.actor, iteration.frozen.actor, experience, last)  # noqa: E731
        kl = jax.lax.cond(actor_moved, measure, lambda: jnp.float32(0))
        state = state.replace(penalty=_where(actor_moved, state.penalty.update(kl), state.penalty))
    metrics = experience_metrics(config, experience, state.kl.value) | _update_metrics(state, sums, steps)
    state, limits = _limited(config, state, metrics)
    kl = _where(actor_moved, state.kl.update(metrics["objective/kl"], len(experience.tokens)), state.kl)
    return state.replace(kl=kl, iteration=state.iteration + 1), metrics | limits


def _where(condition: Array, chosen: Any, other: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), chosen, other)


def _limited(config: PPOConfig, state: PPOState, metrics: dict[str, Array]) -> tuple[PPOState, dict[str, Array]]:
    """Where a limit is passed, the learning rate falls, or the run is told to stop; (state, metrics)."""
    limits = {}
    if config.kl_limit is not None:
        limits["limit/kl"] = metrics["objective/kl"] > config.kl_limit
    if config.ratio_limit is not None:  # the gap |ρ − 1| is above 1 only where ρ is above 2
        limits["limit/ratio"] = metrics["val/largest_ratio_gap"] + 1 > config.ratio_limit
    if limits and config.on_limit == "lower_lr":
        passed = jnp.any(jnp.stack(list(limits.values())))
        state = state.replace(lr_scale=jnp.where(passed, state.lr_scale * config.limit_lr_factor, state.lr_scale))
        limits["limit/lr_scale"] = state.lr_scale
    return state, {name: value.astype(jnp.float32) for name, value in limits.items()}


def _with_moving_average(config: PPOConfig, trained: Trained) -> Trained:
    """The average moves where this trainer keeps one; another trainer's, kept by the engine, stays as it is."""
    if trained.actor_ema is None or config.ema_decay is None:
        return trained
    decay = config.ema_decay
    return trained.replace(
        actor_ema=jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, trained.actor_ema, trained.actor)
    )


def _grouped(rows: Any, groups: tuple[int, ...]) -> Any:
    return jax.tree.map(lambda leaf: leaf.reshape(*groups, -1, *leaf.shape[1:]), rows)


def _update_minibatch(
    iteration: _Iteration,
    trained: Trained,
    state: PPOState,
    rows: Array,
    text: PretrainingRows | None,
    index: Array,
    stopped: Array,
) -> tuple[Trained, PPOState, Sums, _Step]:
    """One optimizer step of actor and critic, rows int[microbatches, rows each], the iteration's `index`-th."""
    config, learn_actor = iteration.config, iteration.learn_actor
    gradients = functools.partial(_minibatch_gradients, iteration, trained, state, rows, text)
    if config.target_kl is None:
        done, (grads, sums) = jnp.ones((), bool), gradients()
    else:  # only the gradients are conditional: a `cond` over parameters and optimizer states would hold them twice
        done, (grads, sums) = ~stopped, jax.lax.cond(stopped, lambda: _zeros_like(gradients), gradients)
    actor_norm, critic_norm = optax.tree.norm(grads[0]), optax.tree.norm(grads[1])
    finite = jnp.isfinite(critic_norm + sums.value_loss)
    finite &= jnp.isfinite(actor_norm + sums.policy_loss) | ~learn_actor
    # Of a score that is not finite a clipped reward would not tell.
    finite &= jnp.all(jnp.isfinite(iteration.experience.scores[rows]))
    # Past the target the minibatch only serves to say so: its own update is not taken either.
    take = finite & done if config.target_kl is None else finite & done & (sums.approx_kl <= config.target_kl)

    per_iteration = config.ppo_epochs * config.num_minibatches
    actor_iteration = jnp.maximum(state.iteration - config.critic_warmup_iterations, 0)
    actor_step, critic_step = (each * per_iteration + index for each in (actor_iteration, state.iteration))
    scale = state.lr_scale if config.on_limit == "lower_lr" else 1.0
    actor, actor_optimizer = apply_gradient(
        create_optimizer(config.actor_optimizer),
        grads[0],
        state.actor_optimizer,
        trained.actor,
        take=take & learn_actor,
        step=actor_step,
        scale=scale,
    )
    critic, critic_optimizer = apply_gradient(
        create_optimizer(config.critic_optimizer),
        grads[1],
        state.critic_optimizer,
        trained.critic,
        take=take,
        step=critic_step,
    )
    state = state.replace(
        actor_optimizer=actor_optimizer,
        critic_optimizer=critic_optimizer,
        skipped_updates=state.skipped_updates + (done & ~finite),
        entropy=jnp.where(done & jnp.isfinite(sums.entropy), sums.entropy, state.entropy),
    )
    actor_lr = jnp.where(learn_actor, learning_rate_schedule(config.actor_optimizer)(actor_step) * scale, 0)
    critic_lr = jnp.float32(learning_rate_schedule(config.critic_optimizer)(critic_step))
    step = _Step(done, take, actor_norm, critic_norm, actor_lr.astype(jnp.float32), critic_lr)
    return trained.replace(actor=actor, critic=critic), state, sums, step


def _minibatch_gradients(
    iteration: _Iteration, trained: Trained, state: PPOState, rows: Array, text: PretrainingRows | None
) -> tuple[tuple[Params, Params], Sums]:
    """(gradients of actor and critic, sums); while only the critic learns, the actor's is 0 and not computed."""
    networks, config, frozen = iteration.networks, iteration.config, iteration.frozen
    weights = LossWeights(
        penalty=state.penalty.value,
        entropy=_entropy_coef(config, state.entropy),
        tokens=jnp.maximum(jnp.sum(iteration.experience.response_mask[rows]), 1).astype(jnp.float32),
        text_tokens=1 if text is None else jnp.maximum(jnp.sum(predicted(text.mask)), 1),
    )

    def of_microbatch(inputs: tuple) -> tuple[tuple[Params, Params], Sums]:
        batch, text = jax.tree.map(lambda leaf: leaf[inputs[0]], iteration.experience), inputs[1]
        loss = lambda actor: actor_loss(networks, config, actor, frozen.actor, batch, text, weights)  # noqa: E731

        def gradient() -> tuple[Params, Sums]:
            actor, sums = jax.grad(loss, has_aux=True)(trained.actor)
            return networks.actor.held(actor), sums

        def measure() -> tuple[Params, Sums]:
            return networks.actor.held(jax.tree.map(jnp.zeros_like, trained.actor)), loss(trained.actor)[1]

        if config.critic_warmup_iterations:
            actor, sums = jax.lax.cond(iteration.learn_actor, gradient, measure)
        else:
            actor, sums = gradient()
        critic, value_sums = jax.grad(critic_loss, argnums=2, has_aux=True)(
            networks, config, trained.critic, frozen, batch, weights.tokens
        )
        return (actor, networks.critic.held(critic)), sums.replace(**value_sums)

    return _over_microbatches(of_microbatch, (rows, text))


def _zeros_like(function: Callable[[], Any]) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(function))


def _over_microbatches(gradients: Callable[[tuple], tuple[Any, Sums]], inputs: tuple) -> tuple[Any, Sums]:
    """Gradients and sums of all microbatches, one after the other, added up; of the ratio gaps the largest."""
    first = jax.tree.map(lambda leaf: leaf[0], inputs)
    if len(inputs[0]) == 1:
        return gradients(first)

    def add(total: tuple, inputs: tuple) -> tuple[tuple, None]:
        grads, sums = gradients(inputs)
        added = jax.tree.map(jnp.add, total, (grads, sums))
        gap = jnp.maximum(total[1].ratio_gap, sums.ratio_gap)
        return (added[0], added[1].replace(ratio_gap=gap)), None

    return jax.lax.scan(add, _zeros_like(lambda: gradients(first)), inputs)[0]


def _entropy_coef(config: PPOConfig, entropy: Array) -> Array | float:
    """The bonus's coefficient, 0 where the last minibatch had more entropy than is wanted.

    Source: He et al. 2025, "Skywork Open Reasoner 1 Technical Report" (adaptive entropy control).
    """
    if config.entropy_target is None:
        return config.entropy_coef
    return jnp.where(entropy < config.entropy_target, config.entropy_coef, 0.0)


def _update_metrics(state: PPOState, sums: Sums, steps: _Step) -> dict[str, Array]:
    """Means over the updates that were done, each leaf of sums and steps [updates]."""
    mean = lambda x: masked_mean(x.astype(jnp.float32), steps.done)  # noqa: E731
    last = jnp.sum(steps.done) - 1
    ratio_variance = masked_mean(jnp.square(sums.ratio - mean(sums.ratio)), steps.done)
    return {
        "policy/approxkl_avg": mean(sums.approx_kl),
        "policy/clipfrac_avg": mean(sums.clipped),
        "policy/entropy_avg": mean(sums.entropy),
        "policy/grad_norm": mean(steps.actor_norm),
        "policy/penalty_kl": mean(sums.penalty_kl),
        "policy/penalty_coef": state.penalty.value,
        "loss/policy_avg": mean(sums.policy_loss),
        "loss/value_avg": mean(sums.value_loss),
        "loss/ptx_avg": mean(sums.ptx_loss),
        "val/clipfrac_avg": mean(sums.value_clipped),
        "val/grad_norm": mean(steps.critic_norm),
        "val/ratio": mean(sums.ratio),
        "val/ratio_var": ratio_variance,
        "val/first_ratio_gap": sums.ratio_gap[0],
        "val/last_ratio_gap": sums.ratio_gap[last],
        "val/largest_ratio_gap": jnp.max(jnp.where(steps.done, sums.ratio_gap, 0)),
        "val/updates": jnp.sum(steps.taken).astype(jnp.float32),
        "val/skipped_updates": state.skipped_updates.astype(jnp.float32),
        "val/bad_steps": state.bad_steps.astype(jnp.float32),
        "lr": steps.actor_lr[last],
        "lr_critic": steps.critic_lr[last],
    }
