"""One PPO iteration, top to bottom: prompts → responses → scores → rewards → advantages → updates → metrics.

    make_experience   1  sample                     prompts [B, P] → responses [B, R]
                      2  score                      log-probs, values [B, R] and scores [B], microbatch by microbatch
                      3  rewards, 4  advantages     [B, R]
    make_update       5  for epoch:                 shuffle the rows
                           for minibatch:           one optimizer step of the actor, one of the critic
                             for microbatch:        Σ of per-token losses / the minibatch's token count
                               6  actor loss, 7  critic loss; accumulate their gradients
                             skip the step if a loss, gradient or score is not finite
                      8  coefficients, limits, metrics

The loops of step 5 are scans, so the size of the program does not depend on the number of epochs and minibatches.
Losses are sums over tokens, divided by the token count of the whole minibatch, so the gradient does not depend on how
rows are split over microbatches or devices. Each `make_…` returns a jitted function that closes over the static
arguments. It is cached: equal arguments return the same function, which is compiled once.

Sizes: B rows, b rows per microbatch, P prompt slots, R response slots, T = P + R.
Source: Schulman et al. 2017; Stiennon et al. 2020, section 3.4.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import Array
from jaxtyping import Bool, Float32, Int32, PRNGKeyArray

from jax_rlhf import rl
from jax_rlhf.models import model_jit
from jax_rlhf.models.decoder import Params as ModelParams
from jax_rlhf.optim.microbatches import BatchPlan, accumulate, zeros_if
from jax_rlhf.parallel import constrain_to, map_row_groups
from jax_rlhf.ppo.config import PPOConfig
from jax_rlhf.ppo.metrics import (
    LossSums,
    StepMetrics,
    add_gradients_and_sums,
    experience_metrics,
    policy_sums,
    update_metrics,
)
from jax_rlhf.ppo.models import Frozen, Models, Params, Trainable
from jax_rlhf.ppo.state import PPOState, entropy_coef, take_step
from jax_rlhf.rl import Batch, Experience, Prompts
from jax_rlhf.rl.types import AnyArray
from jax_rlhf.sampling import Samples, Sampling, in_rows, rollout

_SHUFFLE_ID = np.uint32(0xFFFFFFFF)  # folded into the key for shuffling; sampling folds in row ids, which are smaller
_Gradients = tuple[ModelParams, ModelParams]  # of the actor, of the critic

# ---- prompts → experience ------------------------------------------------------------------------------------------


@functools.cache
def make_experience(models: Models, config: PPOConfig) -> Callable[..., Experience]:
    """generate(params, prompts, key, kl_coef): steps 1 to 4 in one program."""
    sample, score = make_sample(models, config.sampling), make_score(models, config)

    def generate(params: Params, prompts: Prompts, key: PRNGKeyArray, kl_coef: Float32[Array, ""]) -> Experience:
        return score(params, prompts.mask, sample(params, prompts, key), None, kl_coef)

    return model_jit(generate)


@functools.cache
def make_sample(models: Models, sampling: Sampling) -> Callable[[Params, Prompts, PRNGKeyArray], Samples]:
    """sample(params, prompts, key): step 1, which first converts the training weights to the rollout layout."""

    def sample(params: Params, prompts: Prompts, key: PRNGKeyArray) -> Samples:
        model, weights = models.sampling_weights(params)
        return in_rows(rollout(model, weights, prompts, key, sampling), models.layout)  # tokens [B, T], the rest [B, R]

    return model_jit(sample)


@functools.cache
def make_score(models: Models, config: PPOConfig) -> Callable[..., Experience]:
    """score(params, prompt_mask, samples, function_scores, kl_coef): steps 2 to 4.

    function_scores: weighted sum of the reward functions' scores; None without reward functions.
    kl_coef: β, in reward units per nat.
    """
    models = dataclasses.replace(models, logprob_chunk=config.logprob_chunk)

    def score(
        params: Params,
        prompt_mask: Bool[AnyArray, "B P"],
        samples: Samples,
        function_scores: Float32[Array, "B"] | None,
        kl_coef: Float32[Array, ""],
    ) -> Experience:
        params = models.fetch_offloaded(params)
        mask = jnp.concatenate([prompt_mask, samples.response_mask], axis=1)  # [B, T]
        batch = Batch(samples.tokens, mask, start=prompt_mask.shape[1])
        microbatches = len(mask) // (config.microbatch_size or len(mask))

        def by_microbatch(function: Callable[..., Any], **options: float) -> Any:
            function = functools.partial(function, params, **options)
            return map_row_groups(function, batch, microbatches, models.layout)

        batch = batch.replace(frozen_activations=by_microbatch(models.cache_frozen_activations))  # [B, T, D]
        logprobs, _ = by_microbatch(models.actor_logprobs, temperature=config.sampling.temperature)  # [B, R]
        ref_logprobs = by_microbatch(models.reference_logprobs, temperature=config.sampling.temperature)  # [B, R]
        values = by_microbatch(models.values)  # [B, R + 1]
        responses, response_mask = samples.tokens[:, batch.start :], samples.response_mask
        eos_ids = jnp.asarray(config.sampling.eos_ids or (), jnp.int32)
        ended = jnp.any(response_mask & jnp.isin(responses, eos_ids), axis=1)  # [B]
        scores = jnp.zeros(len(mask), jnp.float32) if function_scores is None else function_scores  # [B]
        if models.reward is not None:
            scores = scores + by_microbatch(models.scores)
            scores = scores - params.frozen.missing_eos_bias * ~ended
        unset = dict.fromkeys(("rewards", "advantages", "returns"), jnp.zeros_like(logprobs))  # see `with_advantages`
        experience = Experience(
            tokens=samples.tokens,
            prompt_mask=jnp.asarray(prompt_mask),
            response_mask=response_mask,
            logprobs=jnp.where(response_mask, logprobs, 0),
            sampler_logprobs=samples.logprobs,
            ref_logprobs=jnp.where(response_mask, ref_logprobs, 0),
            values=jnp.where(response_mask, values[:, :-1], 0),
            **unset,
            scores=scores,
            ended=ended,
            kept_mass=samples.kept_mass,
            frozen_activations=batch.frozen_activations,
        )
        return with_advantages(config, experience, values[:, -1], kl_coef)

    return model_jit(score)


def with_advantages(
    config: PPOConfig, experience: Experience, last_values: Float32[Array, "B"], kl_coef: Float32[Array, ""]
) -> Experience:
    """Steps 3 and 4; last_values: the critic's value of the state after the last slot."""
    values, mask, ended = experience.values, experience.response_mask, experience.ended
    penalty = {"clip": config.reward.clip, "missing_eos_penalty": config.reward.missing_eos_penalty}
    scores = rl.shaped_scores(experience.scores, ended, **penalty)  # [B]
    kl = {"kl_coef": kl_coef, "kl_kind": config.kl.kind, "kl_reduction": config.kl.reduction}
    rewards = rl.token_rewards(scores, experience.logprobs, experience.ref_logprobs, mask, **kl)  # [B, R]
    if config.reward.whiten:
        rewards = rl.masked_whiten(rewards, mask, shift_mean=False)
    # A response without EOS fills all R slots, so the state after its last token is the state after the last slot.
    bootstrap = jnp.where(ended, 0, last_values) if config.reward.truncation == "bootstrap" else None  # [B]
    advantages, returns = rl.gae(rewards, values, mask, gamma=config.gamma, lam=config.lam, bootstrap=bootstrap)
    if config.whiten_advantages:
        advantages = rl.masked_whiten(advantages, mask)  # [B, R]
    return experience.replace(rewards=rewards, advantages=advantages, returns=returns)


# ---- experience → updates ------------------------------------------------------------------------------------------


class _Iteration(struct.PyTreeNode):
    """The inputs that all minibatches of an iteration share."""

    frozen: Frozen
    experience: Experience
    learn_actor: Bool[Array, ""]  # False during the critic's warm-up


class _Carry(struct.PyTreeNode):
    """The scan carry from one minibatch to the next."""

    trainable: Trainable
    state: PPOState
    stopped: Bool[Array, ""]  # True once a minibatch has exceeded target_kl


@functools.cache
def make_update(
    models: Models, config: PPOConfig, shardings: tuple | None = None, *, donate: bool = True
) -> Callable[..., tuple[Trainable, PPOState, dict[str, Float32[Array, ""]]]]:
    """update(trainable, state, frozen, experience, texts, seed_key) → (trainable, state, metrics): steps 5 to 8.

    shardings: `shardings_of` (trainable, state), applied to the results; None = one device.
    donate: reuses the buffers of trainable and state. If False, they stay valid, and are in memory twice.
    texts: N rows for the pretraining loss of PPO-ptx, N a multiple of minibatches × microbatches; or None.
    seed_key: the run's key; the shuffles of an iteration depend on it and on `state.iteration`.
    """
    models = dataclasses.replace(models, logprob_chunk=config.logprob_chunk)
    minibatch = _make_minibatch(models, config)

    def update(
        trainable: Trainable,
        state: PPOState,
        frozen: Frozen,
        experience: Experience,
        texts: Batch | None,
        seed_key: PRNGKeyArray,
    ) -> tuple[Trainable, PPOState, dict[str, Float32[Array, ""]]]:
        key = jax.random.fold_in(jax.random.fold_in(seed_key, state.iteration), _SHUFFLE_ID)
        assert config.microbatch_size is not None, "the trainer sets it before it calls make_update"
        plan = BatchPlan(len(experience.tokens), config.num_minibatches, config.microbatch_size)
        skipped_before = state.skipped_updates
        if texts is not None:
            activations = models.cache_frozen_activations(Params(trainable, frozen), texts, critic=False)
            texts = texts.replace(frozen_activations=activations)
            texts = jax.tree.map(lambda x: x.reshape(plan.num_minibatches, plan.microbatches, -1, *x.shape[1:]), texts)
        iteration = _Iteration(frozen, experience, state.iteration >= config.critic.warmup_iterations)

        def row_order(epoch: Int32[Array, ""]) -> Int32[Array, "minibatches microbatches rows"]:
            rows = jax.random.permutation(jax.random.fold_in(key, epoch), plan.rows)  # [B]
            return rows.reshape(plan.num_minibatches, plan.microbatches, plan.microbatch_size)

        def epoch(carry: _Carry, epoch: Int32[Array, ""]) -> tuple[_Carry, StepMetrics]:
            steps = epoch * plan.num_minibatches + jnp.arange(plan.num_minibatches)
            return jax.lax.scan(functools.partial(minibatch, iteration), carry, (row_order(epoch), texts, steps))

        carry = _Carry(trainable, state, stopped=jnp.zeros((), bool))
        carry, measured = jax.lax.scan(epoch, carry, jnp.arange(config.ppo_epochs))
        measured = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), measured)  # [epochs · minibatches]
        skipped = carry.state.skipped_updates > skipped_before
        state = carry.state.replace(bad_steps=jnp.where(skipped, carry.state.bad_steps + 1, 0))

        # 8. The coefficients react to the actor's update, so they change only if the actor was updated.
        metrics = experience_metrics(config, experience, jnp.asarray(state.kl.value))
        moved = iteration.learn_actor & jnp.any(measured.taken)
        if config.loss.policy == "penalty":
            params, last_rows = Params(carry.trainable, frozen), row_order(jnp.int32(config.ppo_epochs - 1))[-1]
            measure = lambda: _penalty_kl(models, config, params, experience, last_rows)  # noqa: E731
            state = state.adapt_penalty(jax.lax.cond(moved, measure, lambda: jnp.float32(0)), moved)
        metrics |= update_metrics(state, measured)
        state, limits = state.apply_limits(config, metrics)
        state = state.adapt_kl(metrics["objective/kl"], plan.rows, moved).replace(iteration=state.iteration + 1)
        trainable, metrics = carry.trainable.with_average(config.actor.ema_decay), metrics | limits
        if shardings is not None:
            trainable, state = constrain_to((trainable, state), shardings)
        return trainable, state, metrics

    return model_jit(update, donate_argnums=(0, 1) if donate else ())


def _make_minibatch(models: Models, config: PPOConfig) -> Callable[..., tuple[_Carry, StepMetrics]]:
    """minibatch(iteration, carry, (rows, texts, step)): one optimizer step of the actor, one of the critic."""

    def minibatch(iteration: _Iteration, carry: _Carry, inputs: tuple) -> tuple[_Carry, StepMetrics]:
        rows, texts, step = inputs  # indices into the experience [microbatches, b]; step counts within the iteration
        trainable, state, experience = carry.trainable, carry.state, iteration.experience
        params = Params(trainable, iteration.frozen)
        tokens = jnp.maximum(jnp.sum(experience.response_mask[rows]), 1).astype(jnp.float32)  # real response tokens
        text_tokens = 1 if texts is None else jnp.maximum(jnp.sum(rl.predicted_tokens(texts.mask)), 1)
        weights = LossWeights(jnp.asarray(state.penalty.value), entropy_coef(config, state), tokens, text_tokens)

        def microbatch(inputs: tuple[Int32[Array, "rows"], Batch | None]) -> tuple[_Gradients, LossSums]:
            batch, text = jax.tree.map(lambda leaf: leaf[inputs[0]], experience), inputs[1]
            actor = lambda actor: actor_loss(models, config, params.with_actor(actor), batch, text, weights)  # noqa: E731
            critic = lambda critic: critic_loss(models, config, params.with_critic(critic), batch, tokens)  # noqa: E731

            def learn() -> tuple[ModelParams, LossSums]:
                gradient, sums = jax.grad(actor, has_aux=True)(trainable.actor)
                return models.actor.constrain(gradient), sums

            def measure() -> tuple[ModelParams, LossSums]:
                return models.actor.constrain(jax.tree.map(jnp.zeros_like, trainable.actor)), actor(trainable.actor)[1]

            warmup = config.critic.warmup_iterations
            gradient, sums = jax.lax.cond(iteration.learn_actor, learn, measure) if warmup else learn()
            critic_gradient, value_sums = jax.grad(critic, has_aux=True)(trainable.critic)
            return (gradient, models.critic.constrain(critic_gradient)), sums.replace(**value_sums)

        gradients = functools.partial(accumulate, microbatch, (rows, texts), add=add_gradients_and_sums)
        if config.limits.target_kl is None:
            done, ((actor_gradient, critic_gradient), sums) = jnp.ones((), bool), gradients()
        else:  # the `cond` covers the gradients only: over parameters and optimizer states it would copy them
            done, ((actor_gradient, critic_gradient), sums) = ~carry.stopped, zeros_if(carry.stopped, gradients)
        actor_norm, critic_norm = optax.tree.norm(actor_gradient), optax.tree.norm(critic_gradient)
        finite = jnp.isfinite(critic_norm + sums.value_loss)
        finite &= jnp.isfinite(actor_norm + sums.policy_loss) | ~iteration.learn_actor
        finite &= jnp.all(jnp.isfinite(experience.scores[rows]))  # reward clipping makes an infinite score finite
        over = jnp.zeros((), bool) if config.limits.target_kl is None else sums.approx_kl > config.limits.target_kl
        take = finite & done & ~over  # the minibatch that exceeds target_kl is measured but not applied

        gradients = {"actor": actor_gradient, "critic": critic_gradient}
        trainable, state, rates = take_step(config, trainable, state, gradients, take=take, step=step)
        state = state.replace(
            skipped_updates=state.skipped_updates + (done & ~finite),
            entropy=jnp.where(done & jnp.isfinite(sums.entropy), sums.entropy, state.entropy),
        )
        measured = StepMetrics(sums, done, take, actor_norm, critic_norm, *rates)
        return _Carry(trainable, state, carry.stopped | over), measured

    return minibatch


class LossWeights(struct.PyTreeNode):
    """Coefficients and token counts of the losses, the same for all microbatches of a minibatch."""

    penalty: Float32[Array, ""]  # β of PPO-penalty
    entropy: Float32[Array, ""] | float  # the entropy bonus's coefficient, per nat
    tokens: Float32[Array, ""]  # real tokens of the minibatch's responses
    text_tokens: Int32[Array, ""] | int  # predicted tokens of the minibatch's pretraining texts


def actor_loss(
    models: Models, config: PPOConfig, params: Params, batch: Experience, text: Batch | None, weights: LossWeights
) -> tuple[Float32[Array, ""], LossSums]:
    """Step 6: the actor's loss on a microbatch, and its metrics.

    L = Σ_t L_t^{clip or penalty} / tokens − c_H · entropy + c_ptx · (Σ_t −log π(text_t)) / text tokens
    """
    mask = batch.response_mask
    logprobs, entropy = models.actor_logprobs(params, batch.batch, temperature=config.sampling.temperature)  # [b, R]
    log_ratio = jnp.where(mask, logprobs - batch.logprobs, 0)  # [b, R]
    old_to_new = rl.kl_estimate(jnp.zeros_like(log_ratio), log_ratio, "k3")  # [b, R]
    if config.loss.policy == "penalty":
        per_token = rl.penalized_surrogate(log_ratio, batch.advantages, old_to_new, beta=weights.penalty)
    else:
        (low, high), cap = config.loss.clip_ranges, config.loss.dual_clip
        per_token = rl.clipped_surrogate(log_ratio, batch.advantages, clip_low=low, clip_high=high, dual_clip=cap)
    measured = {"entropy": entropy, "log_ratio": log_ratio, "old_to_new": old_to_new, "tokens": weights.tokens}
    sums = policy_sums(config, batch, policy_loss=per_token, **measured)
    loss = sums.policy_loss - weights.entropy * sums.entropy if config.loss.entropy_coef else sums.policy_loss
    if text is not None:
        text_logprobs, _ = models.actor_logprobs(params, text, temperature=1.0)  # [n, T − 1]
        ptx_loss = -rl.masked_sum(text_logprobs, rl.predicted_tokens(text.mask)) / weights.text_tokens
        loss, sums = loss + config.loss.ptx_coef * ptx_loss, sums.replace(ptx_loss=ptx_loss)
    return loss, sums


def critic_loss(
    models: Models, config: PPOConfig, params: Params, batch: Experience, tokens: Float32[Array, ""]
) -> tuple[Float32[Array, ""], dict[str, Float32[Array, ""]]]:
    """Step 7: the critic's loss on a microbatch, and its metrics."""
    values = models.values(params, batch.batch)[:, :-1]  # [b, R]
    per_token = rl.clipped_value_loss(values, batch.values, batch.returns, clip_range=config.loss.value_clip_range)
    loss = rl.masked_sum(per_token, batch.response_mask) / tokens
    clipped = (per_token > 0.5 * jnp.square(values - batch.returns)).astype(jnp.float32)  # [b, R]
    return loss, {"value_loss": loss, "value_clipped": rl.masked_sum(clipped, batch.response_mask) / tokens}


def _penalty_kl(
    models: Models, config: PPOConfig, params: Params, experience: Experience, rows: Int32[Array, "microbatches rows"]
) -> Float32[Array, ""]:
    """Mean of k3(old ‖ new) over the tokens of these rows, in nats; it adapts PPO-penalty's β."""

    def microbatch(rows: Int32[Array, "rows"]) -> tuple[Float32[Array, "rows R"], Bool[Array, "rows R"]]:
        batch = jax.tree.map(lambda leaf: leaf[rows], experience)
        logprobs, _ = models.actor_logprobs(params, batch.batch, temperature=config.sampling.temperature)  # [b, R]
        return jnp.where(batch.response_mask, rl.kl_estimate(batch.logprobs, logprobs, "k3"), 0), batch.response_mask

    return rl.masked_mean(*jax.lax.map(microbatch, rows))
