"""A run without its arrays: every model, state and batch as shapes with shardings, and the programs that run over them.

The programs are those of `phases/` and `trainer.py`, not copies: they are lowered for devices that are only described.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jax_rlhf.data import PackedPairs, PairBatch, TextBatch
from jax_rlhf.engine import ModelConfig, running, running_as
from jax_rlhf.hub import Pretrained
from jax_rlhf.models import Decoder, abstract_params, compute_dtypes, logical_axes
from jax_rlhf.models.decoder import Head
from jax_rlhf.models.split import SplitModel, SplitParams
from jax_rlhf.parallel import Layout, padded_vocab_size, places_of
from jax_rlhf.phases import reward, sft
from jax_rlhf.phases.config import RunConfig
from jax_rlhf.phases.ppo import ppo_microbatch, with_schedule_ends
from jax_rlhf.plan.presets import model_shape
from jax_rlhf.rollout import decode_stages, sampling_layout
from jax_rlhf.trainer import minibatch_part
from jax_rlhf.training import PPOConfig, PretrainingRows, programs, supervised
from jax_rlhf.training import state as ppo_state
from jax_rlhf.training.collect import sampling_settings
from jax_rlhf.training.networks import Frozen, Networks, Trained
from jax_rlhf.training.reward import reward_start
from jax_rlhf.training.roles import (
    Start,
    assign_parameters,
    frozen_places,
    networks_of,
    trained_places,
)

_STEPS = 10_000  # of a phase whose data, which a plan does not read, would say: they change no shape


@dataclasses.dataclass(frozen=True)
class Program:
    """One jitted function of a run, and what it is called with.

    Attributes:
      phase, name: where it belongs, and what it does.
      function: the jitted function.
      arguments: as it is called, static ones and shapes.
      resident: what lies on the devices whether this program reads it or not: parameters, optimizer states.
      passing: what lies there for this program: batches, experience.
      decode_bytes: of kernels and cache that a device reads in its loops over tokens, run to their end; 0 without any.
      layout: of training.
    """

    phase: str
    name: str
    function: Callable
    arguments: tuple
    resident: dict[str, Any]
    passing: Any
    layout: Layout
    decode_bytes: float = 0.0


def programs_of(config: RunConfig, layout: Layout) -> list[Program]:
    """All programs of a run.

    Args:
      config: the run's settings.
      layout: the devices.

    Returns:
      The programs, by phase.

    Raises:
      ValueError: sizes that the mesh does not divide, or a model whose shape is not known.
    """
    made = []
    for phase in config.phases:
        made += {"sft": _sft, "reward": _reward, "ppo": _ppo}[phase](config, layout)
    return made


# ---- models --------------------------------------------------------------------------------------------------------


def abstract_model(config: ModelConfig, head: Head, layout: Layout) -> Pretrained | None:
    """A model as `load_model` would load it, as shapes.

    Args:
      config: where it comes from.
      head: "lm" or "scalar".
      layout: the devices.

    Returns:
      The model; None where config.path is None.
    """
    if config.path is None:
        return None
    decoder, stored = model_shape(config.path)
    decoder = decoder.replace(padded_vocab_size=padded_vocab_size(decoder.vocab_size, layout), layout=layout)
    model = Decoder(running(decoder, config), head=head)
    places = SplitModel(model).places(layout).trainable
    return Pretrained(model, _placed(abstract_params(model), places, jnp.dtype(stored)))


def _as_saved(pretrained: Pretrained) -> Pretrained:
    """A model as the phase that trained it writes it, and the next one loads it."""
    shapes = jax.tree.map(
        lambda leaf, dtype: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding),
        pretrained.params,
        compute_dtypes(pretrained.model),
    )
    return dataclasses.replace(pretrained, params=shapes)


def _placed(shapes: Any, places: Any, dtype: Any = None) -> Any:
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=place), shapes, places
    )


def _everywhere(layout: Layout, value: Any) -> jax.ShapeDtypeStruct:
    shape = jax.eval_shape(lambda: value)
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=layout.sharding(()))


def _rows(layout: Layout, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding(("rows",), shape))


# ---- SFT and reward model ------------------------------------------------------------------------------------------


def _sft(config: RunConfig, layout: Layout) -> list[Program]:
    data, pretrained = config.data, abstract_model(config.model, "lm", layout)
    how = sft.how_to_train(config, pretrained.model, data.sft_batch_size, config.sft.steps or _STEPS)
    shape = data.sft_batch_size, data.max_tokens
    ids, flags = _rows(layout, jnp.int32, *shape), _rows(layout, jnp.bool_, *shape)
    return [_supervised("sft", how, pretrained, TextBatch(ids, flags, flags, ids, ids), layout)]


def _reward(config: RunConfig, layout: Layout) -> list[Program]:
    data, settings = config.data_of("reward"), config.reward_training
    pretrained = _reward_start(config, layout)
    how = reward.how_to_train(settings, pretrained.model, data.reward_batch_size, settings.steps or _STEPS)
    rows, width = data.reward_batch_size, data.max_tokens
    ids, flags = _rows(layout, jnp.int32, rows, width), _rows(layout, jnp.bool_, rows, width)
    batch = PairBatch(ids, ids, flags, flags, _rows(layout, jnp.float32, rows))
    if data.packing:
        width, slots = 2 * width, max(1, 2 * width // 64)  # pairs of 32 tokens per text, of which few are shorter
        ids, flags = _rows(layout, jnp.int32, rows, width), _rows(layout, jnp.bool_, rows, width)
        last, real = _rows(layout, jnp.int32, rows, slots), _rows(layout, jnp.bool_, rows, slots)
        batch = PackedPairs(ids, flags, ids, ids, last, last, real, _rows(layout, jnp.float32, rows, slots))
    return [_supervised("reward", how, pretrained, batch, layout)]


def _policy(config: RunConfig, layout: Layout) -> Pretrained:
    """The SFT policy: another run's, or this one's."""
    given = abstract_model(dataclasses.replace(config.model, path=config.sft_model_path), "lm", layout)
    return given or _as_saved(abstract_model(config.model, "lm", layout))


def _reward_start(config: RunConfig, layout: Layout) -> Pretrained:
    settings, layers, models = config.reward_training, config.reward_training.num_layers, []
    pretrained = abstract_model(dataclasses.replace(config.model, path=settings.path), "lm", layout)
    pretrained = pretrained or _policy(config, layout)

    def cut(params: Any) -> Any:
        start = reward_start(dataclasses.replace(pretrained, params=params), layers, jax.random.key(0))
        models.append(start.model)
        return start.params

    shapes = jax.eval_shape(cut, pretrained.params)
    places = SplitModel(models[0]).places(layout).trainable
    return Pretrained(models[0], _placed(shapes, places))


def _supervised(phase: str, how: supervised.Supervised, pretrained: Pretrained, batch: Any, layout: Layout) -> Program:
    places = how.network.places(layout)
    shapes = jax.eval_shape(functools.partial(supervised.split_params, how), pretrained.params)
    params = SplitParams(_placed(shapes.frozen, places.frozen), _placed(shapes.trainable, places.trainable))
    state = _placed(
        supervised.abstract_state(how, params.trainable), supervised.state_places(how, params.trainable, layout)
    )
    arguments = (how, places_of(state), state, params.frozen, batch)
    resident = {
        "parameters": (state.trainable, params.frozen),
        "optimizer": state.optimizer,
    }
    return Program(phase, "step", supervised.step, arguments, resident, batch, layout)


# ---- PPO -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Engine:
    networks: Networks
    trained: Trained
    frozen: Frozen


def _engine(config: RunConfig, layout: Layout) -> _Engine:
    """What `RLHFEngine.create` would hold."""
    models = {
        "actor": _policy(config, layout),
        "reference": abstract_model(config.reference, "lm", layout),
        "critic": abstract_model(config.critic, "scalar", layout),
        "reward": abstract_model(config.reward, "scalar", layout),
    }
    if models["reward"] is None and not config.ppo.reward_functions:
        trained = _as_saved(_reward_start(config, layout))
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
        _placed(trained, trained_places(networks, layout, moving_average=moving)),
        _placed(frozen, frozen_places(networks, layout)),
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
    micro = minibatch_part(settings, data.ppo_batch_size, _prompt_width(config), layout, layout.platform)
    return dataclasses.replace(settings, microbatch_size=micro)


def _prompt_width(config: RunConfig) -> int:
    return config.data.prompt_tokens or config.data.max_prompt_tokens


def _ppo(config: RunConfig, layout: Layout) -> list[Program]:
    engine = _engine(config, layout)
    networks, trained, frozen = engine.networks, engine.trained, engine.frozen
    settings = _settings(config, networks.actor.model.config.vocab_size, layout)
    state = _placed(ppo_state.abstract_state(settings, trained), ppo_state.state_places(settings, trained, layout))
    rows, width = config.data.ppo_batch_size, _prompt_width(config)
    tokens, mask = _rows(layout, jnp.int32, rows, width), _rows(layout, jnp.bool_, rows, width)
    ids, key = _rows(layout, jnp.int32, rows), _everywhere(layout, jax.random.key(0))
    beta, scores = _everywhere(layout, jnp.float32(0)), None
    resident = {
        "parameters": (trained, frozen),
        "optimizer": (state.actor_optimizer, state.critic_optimizer),
    }

    def made(name: str, function: Callable, arguments: tuple, passing: Any, decode: float = 0.0) -> Program:
        return Program("ppo", name, function, arguments, resident, passing, layout, decode)

    sampling = sampling_settings(settings)
    prompts = (networks, sampling, trained, frozen, tokens, mask, ids, key)
    decode = _decode_bytes(networks, rows, width, settings.max_new_tokens)
    samples = _in_rows(programs.sample.eval_shape(*prompts), layout)
    if settings.reward_functions:
        scores = _rows(layout, jnp.float32, rows)
    scored = (networks, settings, trained, frozen, samples, mask, scores, beta)
    experience = _in_rows(programs.score.eval_shape(*scored), layout)
    if programs.in_one_program(networks, settings):
        collected = [made("rollout and scoring", programs.generate, (*prompts, settings, beta), (tokens, mask), decode)]
    else:
        collected = [
            made("rollout", programs.sample, prompts, (tokens, mask), decode),
            made("scoring", programs.score, scored, (samples, mask)),
        ]
    texts = None
    if settings.ptx_coef:
        shape = config.data.sft_batch_size, config.data.max_tokens
        texts = PretrainingRows(_rows(layout, jnp.int32, *shape), _rows(layout, jnp.bool_, *shape))
    places = places_of((trained, state))
    update = (networks, settings, places, trained, state, frozen, experience, texts, key)
    return [*collected, made("update", programs.update, update, (experience, texts))]


def _decode_bytes(networks: Networks, rows: int, width: int, length: int) -> float:
    """Of the actor's kernels and cache on a device, in the rollout layout: all steps of decoding together.

    A step reads every kernel, of a table that only looks tokens up a row per token, and each slot of its stage's cache.
    """
    model = networks.actor.model
    config, layout = model.config, sampling_layout(model.config)

    def held(axes: PartitionSpec | tuple[str, ...], shape: tuple[int, ...]) -> int:
        return math.prod(layout.sharding(axes, shape).shard_shape(shape))

    sizes = jax.tree.map(
        lambda spec, leaf: held(spec, leaf.shape),
        logical_axes(model),
        abstract_params(model),
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )
    if not config.tie_embeddings:
        sizes = {name: size for name, size in sizes.items() if name != "embedding"}
    kernels = sum(jax.tree.leaves(sizes)) * (length - 1)
    stages = decode_stages(length)
    slots = sum((end - start) * (width + end - 1) for start, end in zip((1, *stages), stages, strict=False))
    slot = config.num_layers, rows, config.num_kv_heads, config.head_dim
    cache = 2 * slots * held(("layers", "rows", "kv_heads", "head_dim"), slot)  # keys and values
    return float((kernels + cache) * config.dtype.itemsize)


def _in_rows(tree: Any, layout: Layout) -> Any:
    return jax.tree.map(lambda leaf: _rows(layout, leaf.dtype, *leaf.shape), tree)
