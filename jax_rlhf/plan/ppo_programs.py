"""The programs of PPO: rollout, scoring, update, export. Evaluation on held-out prompts uses the first two."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_rlhf.config import RunConfig
from jax_rlhf.hub.load_model import running, running_as
from jax_rlhf.parallel import Layout, shardings_of
from jax_rlhf.plan.abstract import (
    Program,
    abstract_model,
    as_saved,
    decode_bytes,
    export_program,
    replicated,
    shard_rows,
    sharded_rows,
    token_rows,
    with_shardings,
)
from jax_rlhf.plan.supervised_programs import policy, reward_model
from jax_rlhf.ppo import state as ppo_state
from jax_rlhf.ppo.config import PPOConfig
from jax_rlhf.ppo.initialize import (
    InitialModels,
    create_models,
    create_params,
    frozen_shardings,
    trainable_shardings,
)
from jax_rlhf.ppo.models import Models, Params
from jax_rlhf.ppo.resolve import batch_plan, resolve
from jax_rlhf.ppo.step import make_experience, make_sample, make_score, make_update
from jax_rlhf.ppo.trainer import in_one_program
from jax_rlhf.rl import Batch, Prompts
from jax_rlhf.sampling import sampling_layout


def _engine(config: RunConfig, layout: Layout) -> tuple[Models, Params]:
    """The models of `RLHFEngine.create`, and the shapes of their parameters."""
    models = {
        "actor": policy(config, layout),
        "reference": abstract_model(config.reference, "lm", layout),
        "critic": abstract_model(config.critic, "scalar", layout),
        "reward": abstract_model(config.reward_model, "scalar", layout),
    }
    if models["reward"] is None and not config.ppo.reward.functions:
        trained = as_saved(reward_model(config, layout))
        config_here = running(trained.model.config, config.reward_model)
        models["reward"] = dataclasses.replace(trained, model=trained.model.clone(config=config_here))
    layers = {
        "trainable_layers": config.model.trainable_layers,
        "critic_trainable_layers": config.critic.trainable_layers,
        "critic_zero_head": config.critic.zero_head,
        "offloaded": ("reference",) * config.reference.offload + ("reward",) * config.reward_model.offload,
        "reference_config": running_as(models["actor"].model.config, config.reference, config.model),
        "critic_config": running_as((models["reward"] or models["actor"]).model.config, config.critic, config.model),
    }
    models_of_run = create_models(InitialModels(**models, **layers), layout)

    def create(params: dict[str, Any]) -> Params:
        given = {role: model and dataclasses.replace(model, params=params[role]) for role, model in models.items()}
        return create_params(models_of_run, InitialModels(**given, **layers))

    params = jax.eval_shape(create, {role: model and model.params for role, model in models.items()})
    moving, trainable = config.ppo.actor.ema_decay is not None, params.trainable
    trainable = dataclasses.replace(trainable, actor_ema=trainable.actor if moving else None)
    shardings = trainable_shardings(models_of_run, layout, moving_average=moving)
    frozen = with_shardings(params.frozen, frozen_shardings(models_of_run, layout))
    return models_of_run, Params(with_shardings(trainable, shardings), frozen)


def _settings(config: RunConfig, vocab_size: int, layout: Layout) -> PPOConfig:
    """PPO's settings, with arbitrary ids of special tokens, which do not affect shapes."""
    settings = resolve(config.ppo, config.data, layout, eos_ids=(vocab_size - 1,), pad_id=0)
    plan = batch_plan(settings, config.data.ppo_batch_size, config.data.prompt_width, layout, layout.platform)
    return dataclasses.replace(settings, microbatch_size=plan.microbatch_size)


def ppo_programs(config: RunConfig, layout: Layout) -> list[Program]:
    """The programs of PPO."""
    models, params = _engine(config, layout)
    trainable, frozen = params.trainable, params.frozen
    settings = _settings(config, models.actor.model.config.vocab_size, layout)
    state = with_shardings(
        ppo_state.abstract_state(settings, trainable), ppo_state.state_shardings(settings, trainable, layout)
    )
    rows, width = config.data.ppo_batch_size, config.data.prompt_width
    tokens, mask = token_rows(layout, rows, width)
    ids, key = sharded_rows(layout, jnp.int32, rows), replicated(layout, jax.random.key(0))
    kl_coef, scores = replicated(layout, jnp.float32(0)), None
    offloaded = {role: getattr(frozen, role) for role in models.offloaded}
    resident = {
        "parameters": (trainable, dataclasses.replace(frozen, **dict.fromkeys(offloaded))),
        "optimizer": (state.actor_optimizer, state.critic_optimizer),
    }

    def made(name: str, function: Callable, arguments: tuple, transient: Any, decode: float = 0.0) -> Program:
        rollout = sampling_layout(models.actor.model.config) if decode else None
        return Program("ppo", name, function, arguments, resident, transient, layout, decode, offloaded, rollout)

    sample, score = make_sample(models, settings.sampling), make_score(models, settings)
    prompts = (params, Prompts(tokens, mask, ids, columns=None), key)
    decode = decode_bytes(models.actor.model, rows, width, settings.sampling.max_new_tokens)
    samples = shard_rows(sample.eval_shape(*prompts), layout)
    if settings.reward.functions:
        scores = sharded_rows(layout, jnp.float32, rows)
    scored = (params, mask, samples, scores, kl_coef)
    experience = shard_rows(score.eval_shape(*scored), layout)
    # A simulated GPU has no memory kinds. XLA does not know that offloaded parameters are copied to the device, and
    # reserves no memory for them.
    fetched = [leaf for leaf in jax.tree.leaves(offloaded) if leaf.sharding.memory_kind != "pinned_host"]
    if in_one_program(models, settings):
        both, transient = (*prompts, kl_coef), (tokens, mask, fetched)
        experience_programs = [made("rollout and scoring", make_experience(models, settings), both, transient, decode)]
    else:
        experience_programs = [
            made("rollout", sample, prompts, (tokens, mask), decode),
            made("scoring", score, scored, (samples, mask, fetched)),
        ]
    texts = None
    if settings.loss.ptx_coef:
        texts = Batch(*token_rows(layout, config.data.sft_batch_size, config.data.max_tokens))
    update = make_update(models, settings, shardings_of((trainable, state)))
    updated = (trainable, state, frozen, experience, texts, key)
    trained_models = [(models.actor, params.actor), (models.critic, params.critic)]
    exported = export_program("ppo", trained_models, resident, layout)
    exported = [dataclasses.replace(one, offloaded=offloaded) for one in exported]
    return [*experience_programs, made("update", update, updated, (experience, texts)), *exported]
