"""The programs of PPO: rollout, scoring, update, export. Held-out prompts are answered and scored by the first two."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_rlhf.engine import running, running_as
from jax_rlhf.models.split import SplitParams
from jax_rlhf.parallel import Layout, places_of
from jax_rlhf.phases.config import RunConfig
from jax_rlhf.phases.ppo import ppo_microbatch, with_schedule_ends
from jax_rlhf.plan.abstract import (
    Program,
    abstract_model,
    as_saved,
    decode_bytes,
    everywhere,
    export_program,
    in_rows,
    placed,
    prompt_width,
    rows_of,
    token_rows,
)
from jax_rlhf.plan.supervised_programs import policy, reward_model
from jax_rlhf.trainer import minibatch_part
from jax_rlhf.training import PPOConfig, PretrainingRows, programs
from jax_rlhf.training import state as ppo_state
from jax_rlhf.training.collect import sampling_settings
from jax_rlhf.training.networks import Frozen, Networks, Trained
from jax_rlhf.training.roles import Start, assign_parameters, frozen_places, networks_of, trained_places


@dataclasses.dataclass(frozen=True)
class _Engine:
    networks: Networks
    trained: Trained
    frozen: Frozen


def _engine(config: RunConfig, layout: Layout) -> _Engine:
    """What `RLHFEngine.create` would hold."""
    models = {
        "actor": policy(config, layout),
        "reference": abstract_model(config.reference, "lm", layout),
        "critic": abstract_model(config.critic, "scalar", layout),
        "reward": abstract_model(config.reward, "scalar", layout),
    }
    if models["reward"] is None and not config.ppo.reward_functions:
        trained = as_saved(reward_model(config, layout))
        config_here = running(trained.model.config, config.reward)
        models["reward"] = dataclasses.replace(trained, model=trained.model.clone(config=config_here))
    layers = {
        "trainable_layers": config.model.trainable_layers,
        "critic_trainable_layers": config.critic.trainable_layers,
        "critic_zero_head": config.critic.zero_head,
        "offloaded": tuple(role for role in ("reference", "reward") if getattr(config, role).offload),
        "reference_config": running_as(models["actor"].model.config, config.reference, config.model),
        "critic_config": running_as((models["reward"] or models["actor"]).model.config, config.critic, config.model),
    }
    networks = networks_of(Start(**models, **layers), layout)

    def assign(params: dict[str, Any]) -> tuple[Trained, Frozen]:
        given = {role: model and dataclasses.replace(model, params=params[role]) for role, model in models.items()}
        return assign_parameters(networks, Start(**given, **layers))

    trained, frozen = jax.eval_shape(assign, {role: model and model.params for role, model in models.items()})
    moving = config.ppo.ema_decay is not None
    trained = dataclasses.replace(trained, actor_ema=trained.actor if moving else None)
    return _Engine(
        networks,
        placed(trained, trained_places(networks, layout, moving_average=moving)),
        placed(frozen, frozen_places(networks, layout)),
    )


def _settings(config: RunConfig, vocab_size: int, layout: Layout) -> PPOConfig:
    """PPO's settings, with what the tokenizer would say made up: it changes no shape."""
    settings, data = config.ppo, config.data
    settings = dataclasses.replace(
        with_schedule_ends(settings),
        microbatch_size=ppo_microbatch(config, layout),
        eos_ids=settings.eos_ids or (vocab_size - 1,),
        pad_id=settings.pad_id or 0,
    )
    micro = minibatch_part(settings, data.ppo_batch_size, prompt_width(config), layout, layout.platform)
    return dataclasses.replace(settings, microbatch_size=micro)


def ppo_programs(config: RunConfig, layout: Layout) -> list[Program]:
    """Those of PPO.

    Args:
      config: the run's settings.
      layout: the devices.

    Returns:
      The programs.
    """
    engine = _engine(config, layout)
    networks, trained, frozen = engine.networks, engine.trained, engine.frozen
    settings = _settings(config, networks.actor.model.config.vocab_size, layout)
    state = placed(ppo_state.abstract_state(settings, trained), ppo_state.state_places(settings, trained, layout))
    rows, width = config.data.ppo_batch_size, prompt_width(config)
    tokens, mask = token_rows(layout, rows, width)
    ids, key = rows_of(layout, jnp.int32, rows), everywhere(layout, jax.random.key(0))
    beta, scores = everywhere(layout, jnp.float32(0)), None
    waiting = {role: getattr(frozen, role) for role in networks.offloaded}
    resident = {
        "parameters": (trained, dataclasses.replace(frozen, **dict.fromkeys(waiting))),
        "optimizer": (state.actor_optimizer, state.critic_optimizer),
    }

    def made(name: str, function: Callable, arguments: tuple, passing: Any, decode: float = 0.0) -> Program:
        return Program("ppo", name, function, arguments, resident, passing, layout, decode, waiting)

    sampling = sampling_settings(settings)
    prompts = (networks, sampling, trained, frozen, tokens, mask, ids, key)
    decode = decode_bytes(networks.actor.model, rows, width, settings.max_new_tokens)
    samples = in_rows(programs.sample.eval_shape(*prompts), layout)
    if settings.reward_functions:
        scores = rows_of(layout, jnp.float32, rows)
    scored = (networks, settings, trained, frozen, samples, mask, scores, beta)
    experience = in_rows(programs.score.eval_shape(*scored), layout)
    # A described GPU has no memory kinds, so XLA does not see that these are copied to the device, and counts no room.
    fetched = [leaf for leaf in jax.tree.leaves(waiting) if leaf.sharding.memory_kind != "pinned_host"]
    if programs.in_one_program(networks, settings):
        both, passing = (*prompts, settings, beta), (tokens, mask, fetched)
        collected = [made("rollout and scoring", programs.generate, both, passing, decode)]
    else:
        collected = [
            made("rollout", programs.sample, prompts, (tokens, mask), decode),
            made("scoring", programs.score, scored, (samples, mask, fetched)),
        ]
    texts = None
    if settings.ptx_coef:
        texts = PretrainingRows(*token_rows(layout, config.data.sft_batch_size, config.data.max_tokens))
    places = places_of((trained, state))
    update = (networks, settings, places, trained, state, frozen, experience, texts, key)
    parts = SplitParams(frozen.actor, trained.actor), SplitParams(frozen.critic, trained.critic)
    exported = export_program("ppo", list(zip((networks.actor, networks.critic), parts, strict=True)), resident, layout)
    exported = [dataclasses.replace(one, waiting=waiting) for one in exported]
    return [*collected, made("update", programs.update, update, (experience, texts)), *exported]
