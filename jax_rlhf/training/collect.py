"""The first program of an iteration: prompts → responses → log-probs, values, scores → rewards → advantages."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from jax_rlhf.models import Decoder
from jax_rlhf.models.decoder import Params
from jax_rlhf.models.split import SplitParams
from jax_rlhf.parallel import map_row_groups
from jax_rlhf.rl import Experience, gae, masked_whiten, shaped_scores, token_rewards
from jax_rlhf.rollout import Samples, Sampling, decodes_unrolled, in_rows, reshard, rollout
from jax_rlhf.training.config import PPOConfig
from jax_rlhf.training.networks import (
    Frozen,
    Networks,
    Trained,
    boundaries,
    critic_values,
    policy_logprobs,
    reference_logprobs,
    reward_scores,
)


def sampling_settings(config: PPOConfig) -> Sampling:
    """The sampler's share of the config, whose `eos_ids` and `pad_id` are known by now.

    Args:
      config: the config.

    Returns:
      The settings.
    """
    return Sampling(
        max_new_tokens=config.max_new_tokens,
        min_new_tokens=config.min_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        eos_ids=config.eos_ids or (),
        pad_id=config.pad_id or 0,
    )


def sample_responses(
    networks: Networks,
    sampling: Sampling,
    trained: Trained,
    frozen: Frozen,
    prompts: Array,
    prompt_mask: Array,
    row_ids: Array,
    key: Array,
) -> Samples:
    """Samples with rollout parameters made from the training parameters, here and now.

    Args:
      networks: the models.
      sampling: how.
      trained, frozen: their parameters.
      prompts: int[B, P], padded on the left.
      prompt_mask: bool[B, P].
      row_ids: int[B].
      key: of this iteration.

    Returns:
      The samples.
    """
    model, params = rollout_params(networks, trained, frozen)
    samples = rollout(model, params, prompts, prompt_mask, key, row_ids, sampling)
    return in_rows(samples, networks.actor.model.config.layout)


def rollout_params(networks: Networks, trained: Trained, frozen: Frozen) -> tuple[Decoder, Params]:
    """The actor as the sampler runs it: see `rollout/reshard.py`.

    Args:
      networks: the models.
      trained, frozen: their parameters.

    Returns:
      (model, params).
    """
    actor = networks.actor
    model, params = reshard(actor.model, SplitParams(frozen.actor, trained.actor), actor.axes())
    if decodes_unrolled(model.config):
        return model.clone(scan_layers=False), actor.unstack(params)
    return model, actor.join(params)


def score_samples(
    networks: Networks,
    config: PPOConfig,
    trained: Trained,
    frozen: Frozen,
    samples: Samples,
    prompt_mask: Array,
    function_scores: Array | None,
    kl_coef: Array,
) -> Experience:
    """Scores samples by all models, and makes rewards, advantages and returns of it.

    Args:
      networks: the models.
      config: PPO's; of `microbatch_size` rows, all where None, the activations exist at once.
      trained, frozen: parameters.
      samples: what the actor sampled.
      prompt_mask: bool[B, P].
      function_scores: float32[B], weighted sum of reward functions' scores; None where there are none.
      kl_coef: float32[], β.

    Returns:
      The experience.
    """
    tokens, response_mask = samples.tokens, samples.response_mask
    mask = jnp.concatenate([prompt_mask, response_mask], axis=1)
    start, frozen = prompt_mask.shape[1], networks.fetched(frozen)
    how = {"start": start, "temperature": config.temperature, "chunk": config.logprob_chunk}
    groups = len(tokens) // (config.microbatch_size or len(tokens))

    def by_groups(function: Callable, *more: Array | None) -> Any:  # one model after the other, some rows at a time
        each = lambda rows: function(*rows)  # noqa: E731
        return map_row_groups(each, (tokens, mask, *more), groups, networks.actor.model.config.layout)

    bottom = by_groups(functools.partial(boundaries, networks, frozen))
    actor = SplitParams(frozen.actor, trained.actor)
    logprobs = by_groups(lambda *rows: policy_logprobs(networks.actor, actor, *rows, **how)[0], bottom.actor)
    ref_logprobs = by_groups(lambda *rows: reference_logprobs(networks, frozen, *rows, **how), bottom.actor)
    critic = functools.partial(critic_values, networks.critic, SplitParams(frozen.critic, trained.critic))
    values = by_groups(functools.partial(critic, start=start, bias=frozen.critic_bias), bottom.critic)

    ended = jnp.any(response_mask & jnp.isin(tokens[:, start:], jnp.asarray(config.eos_ids or (), jnp.int32)), axis=1)
    scores = jnp.zeros(len(tokens), jnp.float32) if function_scores is None else function_scores
    if networks.reward is not None:
        scores = scores + by_groups(functools.partial(reward_scores, networks, frozen), bottom.critic)
        scores = scores - frozen.missing_eos_bias * ~ended
    experience = Experience(
        tokens=tokens,
        prompt_mask=prompt_mask,
        response_mask=response_mask,
        logprobs=jnp.where(response_mask, logprobs, 0),
        sampler_logprobs=samples.logprobs,
        ref_logprobs=jnp.where(response_mask, ref_logprobs, 0),
        values=jnp.where(response_mask, values[:, :-1], 0),
        rewards=jnp.zeros_like(logprobs),
        advantages=jnp.zeros_like(logprobs),
        returns=jnp.zeros_like(logprobs),
        scores=scores,
        ended=ended,
        kept_mass=samples.kept_mass,
        actor_boundary=bottom.actor,
        critic_boundary=bottom.critic,
    )
    return with_advantages(config, experience, values[:, -1], kl_coef)


def with_advantages(config: PPOConfig, experience: Experience, last_values: Array, kl_coef: Array) -> Experience:
    """Rewards, advantages and returns from scores, log-probs and values.

    Args:
      config: PPO's.
      experience: with everything but these.
      last_values: float32[B], the critic's value of the state after the last slot.
      kl_coef: float32[], β.

    Returns:
      The experience, complete.
    """
    mask = experience.response_mask
    shape = {"clip": config.reward_clip, "missing_eos_penalty": config.missing_eos_penalty}
    scores = shaped_scores(experience.scores, experience.ended, **shape)
    how = {"kl_coef": kl_coef, "kl_kind": config.kl_kind, "kl_reduction": config.kl_reduction}
    rewards = token_rewards(scores, experience.logprobs, experience.ref_logprobs, mask, **how)
    if config.whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift_mean=False)
    # A response without EOS fills all R slots, so the state after its last token is the one after the last slot.
    bootstrap = jnp.where(experience.ended, 0, last_values) if config.truncation == "bootstrap" else None
    advantages, returns = gae(rewards, experience.values, mask, gamma=config.gamma, lam=config.lam, bootstrap=bootstrap)
    if config.whiten_advantages:
        advantages = masked_whiten(advantages, mask)
    return dataclasses.replace(experience, rewards=rewards, advantages=advantages, returns=returns)
