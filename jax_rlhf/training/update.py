"""The second program of an iteration: epochs × minibatches × microbatches over an experience.

    for epoch:                                  rows in a fresh order
      for minibatch:                            one optimizer step of actor and critic each
        for microbatch:                         Σ of per-token losses / the minibatch's token count
          gradients, added up
        skip if not finite, else step

All three loops are scans, so that the program is as long with 4 × 4 as with 1 × 1. Losses are sums over tokens, divided
by the count of the whole minibatch: splitting rows over microbatches or devices does not change the gradient.
"""

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
from jax_rlhf.rl import (
    Experience,
    clipped_surrogate,
    clipped_value_loss,
    kl_estimate,
    masked_mean,
    masked_sum,
    penalized_surrogate,
)
from jax_rlhf.training.config import PPOConfig
from jax_rlhf.training.metrics import experience_metrics
from jax_rlhf.training.networks import Frozen, Networks, Trained, critic_values, policy_logprobs
from jax_rlhf.training.optimizer import apply_gradient, create_optimizer, learning_rate_schedule
from jax_rlhf.training.state import PPOState


@struct.dataclass
class PretrainingRows:
    """Text for the pretraining loss of PPO-ptx.

    Attributes:
      tokens: int32[N, T]; N a multiple of minibatches × microbatches.
      mask: bool[N, T], True = real token.
      boundary: float[N, T, D], output of the actor's frozen bottom; filled in by the update.
    """

    tokens: Array
    mask: Array
    boundary: Array | None = None


@struct.dataclass
class _Sums:
    """What a microbatch adds up over tokens; divided by the minibatch's token count at once."""

    policy_loss: Array
    value_loss: Array
    ptx_loss: Array
    entropy: Array
    approx_kl: Array
    penalty_kl: Array
    clipped: Array
    value_clipped: Array
    ratio: Array
    ratio_gap: Array  # the largest |ρ − 1|


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
    skipped_before = state.skipped_updates

    def order(epoch: Array) -> Array:
        shuffled = jax.random.permutation(jax.random.fold_in(key, epoch), rows)
        return shuffled.reshape(config.num_minibatches, per_minibatch // micro, micro)

    def minibatch(carry: tuple, inputs: tuple) -> tuple[tuple, tuple[_Sums, Array, Array]]:
        trained, state, stopped = carry

        def update() -> tuple:
            return _update_minibatch(networks, config, trained, state, frozen, experience, *inputs, learn_actor)

        def skip() -> tuple:
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(update))

        done = ~stopped
        if config.target_kl is None:
            trained, state, sums, norms = update()
        else:
            trained, state, sums, norms = jax.lax.cond(stopped, lambda: (trained, state, *skip()[2:]), update)
            stopped = stopped | (sums.approx_kl > config.target_kl)
        return (trained, state, stopped), (sums, norms, done)

    def epoch(carry: tuple, index: Array) -> tuple[tuple, tuple]:
        return jax.lax.scan(minibatch, carry, (order(index), pretraining))

    start = (trained, state, jnp.zeros((), bool))
    (trained, state, _), (sums, norms, done) = jax.lax.scan(epoch, start, jnp.arange(config.ppo_epochs))
    sums, norms, done = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (sums, norms, done))

    if config.policy_loss == "penalty":
        last = order(jnp.int32(config.ppo_epochs - 1))[-1]
        kl = _penalty_kl(networks, config, trained, frozen, experience, last)
        state = state.replace(penalty=state.penalty.update(kl))
    bad = state.skipped_updates > skipped_before
    state = state.replace(bad_steps=jnp.where(bad, state.bad_steps + 1, 0))
    metrics = experience_metrics(experience, state.kl.value) | _update_metrics(config, state, sums, norms, done)
    state, limits = _limited(config, state, metrics)
    metrics |= limits
    state = state.replace(kl=state.kl.update(metrics["objective/kl"], rows), iteration=state.iteration + 1)
    return _with_moving_average(config, trained), state, metrics


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
    if trained.actor_ema is None:
        return trained
    decay = config.ema_decay
    return trained.replace(
        actor_ema=jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, trained.actor_ema, trained.actor)
    )


def _grouped(rows: Any, groups: tuple[int, ...]) -> Any:
    return jax.tree.map(lambda leaf: leaf.reshape(*groups, -1, *leaf.shape[1:]), rows)


def _update_minibatch(
    networks: Networks,
    config: PPOConfig,
    trained: Trained,
    state: PPOState,
    frozen: Frozen,
    experience: Experience,
    rows: Array,
    pretraining: PretrainingRows | None,
    learn_actor: Array,
) -> tuple[Trained, PPOState, _Sums, dict[str, Array]]:
    """One optimizer step of actor and critic, rows int[microbatches, rows each]."""
    count = jnp.maximum(jnp.sum(experience.response_mask[rows]), 1).astype(jnp.float32)
    ptx_count = jnp.float32(1) if pretraining is None else jnp.maximum(jnp.sum(_predicted(pretraining.mask)), 1)
    entropy_coef = _entropy_coef(config, state.entropy)

    def gradients(inputs: tuple) -> tuple[tuple[Params, Params], _Sums]:
        batch, text = jax.tree.map(lambda leaf: leaf[inputs[0]], experience), inputs[1]
        (_, sums), actor = jax.value_and_grad(_actor_loss, argnums=2, has_aux=True)(
            networks,
            config,
            trained.actor,
            frozen.actor,
            batch,
            text,
            state.penalty.value,
            entropy_coef,
            count,
            ptx_count,
        )
        (_, value_sums), critic = jax.value_and_grad(_critic_loss, argnums=2, has_aux=True)(
            networks, config, trained.critic, frozen, batch, count
        )
        return (networks.actor.held(actor), networks.critic.held(critic)), sums.replace(**value_sums)

    grads, sums = _over_microbatches(gradients, (rows, pretraining))
    actor_norm, critic_norm = optax.tree.norm(grads[0]), optax.tree.norm(grads[1])
    finite = jnp.isfinite(actor_norm) & jnp.isfinite(critic_norm) & jnp.isfinite(sums.policy_loss + sums.value_loss)
    finite &= jnp.all(jnp.isfinite(experience.scores[rows]))  # of an infinite one a clipped reward would not tell
    # Past the target the minibatch only serves to say so: its own update is not taken either.
    take = finite if config.target_kl is None else finite & (sums.approx_kl <= config.target_kl)
    actor, actor_optimizer = apply_gradient(
        create_optimizer(config.actor_optimizer),
        grads[0],
        state.actor_optimizer,
        trained.actor,
        take & learn_actor,
        state.lr_scale if config.on_limit == "lower_lr" else None,
    )
    critic, critic_optimizer = apply_gradient(
        create_optimizer(config.critic_optimizer), grads[1], state.critic_optimizer, trained.critic, take
    )
    state = state.replace(
        actor_optimizer=actor_optimizer,
        critic_optimizer=critic_optimizer,
        skipped_updates=state.skipped_updates + ~finite,
        entropy=jnp.where(jnp.isfinite(sums.entropy), sums.entropy, state.entropy),
    )
    norms = {"actor": actor_norm, "critic": critic_norm, "taken": take}
    return trained.replace(actor=actor, critic=critic), state, sums, norms


def _over_microbatches(gradients: Callable[[tuple], tuple[Any, _Sums]], inputs: tuple) -> tuple[Any, _Sums]:
    """Gradients and sums of all microbatches, one after the other, added up; of the ratio gaps the largest."""
    first = jax.tree.map(lambda leaf: leaf[0], inputs)
    if len(inputs[0]) == 1:
        return gradients(first)

    def add(total: tuple, inputs: tuple) -> tuple[tuple, None]:
        grads, sums = gradients(inputs)
        added = jax.tree.map(jnp.add, total, (grads, sums))
        gap = jnp.maximum(total[1].ratio_gap, sums.ratio_gap)
        return (added[0], added[1].replace(ratio_gap=gap)), None

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(gradients, first))
    return jax.lax.scan(add, zeros, inputs)[0]


def _entropy_coef(config: PPOConfig, entropy: Array) -> Array | float:
    """The bonus's coefficient, 0 where the last minibatch had more entropy than is wanted.

    Source: He et al. 2025, "Skywork Open Reasoner 1 Technical Report" (adaptive entropy control).
    """
    if config.entropy_target is None:
        return config.entropy_coef
    return jnp.where(entropy < config.entropy_target, config.entropy_coef, 0.0)


def _actor_loss(
    networks: Networks,
    config: PPOConfig,
    actor: Params,
    frozen: Params,
    batch: Experience,
    text: PretrainingRows | None,
    penalty: Array,
    entropy_coef: Array | float,
    count: Array,
    ptx_count: Array,
) -> tuple[Array, _Sums]:
    params, mask = SplitParams(frozen, actor), batch.response_mask
    logprobs, entropy = _new_logprobs(networks, config, params, batch)
    log_ratio = jnp.where(mask, logprobs - batch.logprobs, 0)
    old_to_new = kl_estimate(jnp.zeros_like(log_ratio), log_ratio, "k3")
    if config.policy_loss == "penalty":
        per_token = penalized_surrogate(log_ratio, batch.advantages, old_to_new, beta=penalty)
        low, high = -jnp.inf, jnp.inf
    else:
        low, high = config.clip_range, config.clip_range
        high = high if config.clip_range_high is None else config.clip_range_high
        per_token = clipped_surrogate(
            log_ratio, batch.advantages, clip_low=low, clip_high=high, dual_clip=config.dual_clip
        )
    policy_loss = masked_sum(per_token, mask) / count
    mean_entropy = masked_sum(entropy, mask) / count
    loss = policy_loss - entropy_coef * mean_entropy if config.entropy_coef else policy_loss
    ptx_loss = jnp.float32(0)
    if text is not None:
        ptx_loss = _pretraining_loss(networks, config, params, text) / ptx_count
        loss = loss + config.ptx_coef * ptx_loss
    ratio, advantages = jnp.exp(log_ratio), batch.advantages
    clipped = jnp.where(advantages < 0, ratio < 1 - low, ratio > 1 + high)
    mean = lambda x: masked_sum(x.astype(jnp.float32), mask) / count  # noqa: E731
    return loss, _Sums(
        policy_loss=policy_loss,
        value_loss=jnp.float32(0),
        ptx_loss=ptx_loss,
        entropy=mean_entropy,
        approx_kl=mean(0.5 * jnp.square(log_ratio)),
        penalty_kl=mean(old_to_new),
        clipped=mean(clipped),
        value_clipped=jnp.float32(0),
        ratio=mean(ratio),
        ratio_gap=jnp.max(jnp.abs(ratio - 1), initial=0, where=mask),
    )


def _new_logprobs(networks: Networks, config: PPOConfig, params: SplitParams, batch: Experience) -> tuple[Array, Array]:
    mask = jnp.concatenate([batch.prompt_mask, batch.response_mask], axis=1)
    return policy_logprobs(
        networks.actor,
        params,
        batch.tokens,
        mask,
        batch.actor_boundary,
        start=batch.prompt_mask.shape[1],
        temperature=config.temperature,
        chunk=config.logprob_chunk,
    )


def _predicted(mask: Array) -> Array:
    """Tokens of padded rows that the pretraining loss counts: real, after a real one."""
    return mask[..., 1:] & mask[..., :-1]


def _pretraining_loss(networks: Networks, config: PPOConfig, params: SplitParams, text: PretrainingRows) -> Array:
    """Σ −log π(token) at temperature 1 over the rows: InstructGPT's PPO-ptx (Ouyang et al. 2022, eq. 2)."""
    logprobs, _ = policy_logprobs(
        networks.actor,
        params,
        text.tokens,
        text.mask,
        text.boundary,
        start=1,
        temperature=1.0,
        chunk=config.logprob_chunk,
    )
    return -masked_sum(logprobs, _predicted(text.mask))


def _critic_loss(
    networks: Networks, config: PPOConfig, critic: Params, frozen: Frozen, batch: Experience, count: Array
) -> tuple[Array, dict[str, Array]]:
    mask, full_mask = batch.response_mask, jnp.concatenate([batch.prompt_mask, batch.response_mask], axis=1)
    start = batch.prompt_mask.shape[1]
    values = critic_values(
        networks.critic,
        SplitParams(frozen.critic, critic),
        batch.tokens,
        full_mask,
        batch.critic_boundary,
        start=start,
        bias=frozen.critic_bias,
    )[:, :-1]
    per_token = clipped_value_loss(values, batch.values, batch.returns, clip_range=config.value_clip_range)
    loss = masked_sum(per_token, mask) / count
    clipped = per_token > 0.5 * jnp.square(values - batch.returns)
    return loss, {"value_loss": loss, "value_clipped": masked_sum(clipped.astype(jnp.float32), mask) / count}


def _penalty_kl(
    networks: Networks, config: PPOConfig, trained: Trained, frozen: Frozen, experience: Experience, rows: Array
) -> Array:
    """Token mean of k3(old ‖ new) on these rows, after the last update."""

    def of(rows: Array) -> tuple[Array, Array]:
        batch = jax.tree.map(lambda leaf: leaf[rows], experience)
        logprobs, _ = _new_logprobs(networks, config, SplitParams(frozen.actor, trained.actor), batch)
        return jnp.where(batch.response_mask, kl_estimate(batch.logprobs, logprobs, "k3"), 0), batch.response_mask

    return masked_mean(*jax.lax.map(of, rows))


def _update_metrics(
    config: PPOConfig, state: PPOState, sums: _Sums, norms: dict[str, Array], done: Array
) -> dict[str, Array]:
    """Means over the updates that were done, each sums leaf float32[updates]."""
    mean = lambda x: masked_mean(x.astype(jnp.float32), done)  # noqa: E731
    steps = [
        optax.tree_utils.tree_get_all_with_path(optimizer, "count")[0][1]
        for optimizer in (state.actor_optimizer, state.critic_optimizer)
    ]
    return {
        "policy/approxkl_avg": mean(sums.approx_kl),
        "policy/clipfrac_avg": mean(sums.clipped),
        "policy/entropy_avg": mean(sums.entropy),
        "policy/grad_norm": mean(norms["actor"]),
        "policy/penalty_kl": mean(sums.penalty_kl),
        "policy/penalty_coef": state.penalty.value,
        "loss/policy_avg": mean(sums.policy_loss),
        "loss/value_avg": mean(sums.value_loss),
        "loss/ptx_avg": mean(sums.ptx_loss),
        "val/clipfrac_avg": mean(sums.value_clipped),
        "val/grad_norm": mean(norms["critic"]),
        "val/ratio": mean(sums.ratio),
        "val/ratio_var": jnp.sum(jnp.where(done, jnp.square(sums.ratio - mean(sums.ratio)), 0)) / jnp.sum(done),
        "val/first_ratio_gap": sums.ratio_gap[0],
        "val/last_ratio_gap": sums.ratio_gap[-1],
        "val/largest_ratio_gap": jnp.max(jnp.where(done, sums.ratio_gap, 0)),
        "val/updates": jnp.sum(done & norms["taken"]).astype(jnp.float32),
        "val/skipped_updates": state.skipped_updates.astype(jnp.float32),
        "val/bad_steps": state.bad_steps.astype(jnp.float32),
        "lr": jnp.float32(learning_rate_schedule(config.actor_optimizer)(steps[0])),
        "lr_critic": jnp.float32(learning_rate_schedule(config.critic_optimizer)(steps[1])),
    }
