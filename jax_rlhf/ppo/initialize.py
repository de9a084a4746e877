"""Who starts as what: from checkpoints to the parameters that PPO trains and those that it holds frozen.

actor       trains                     as given
reference   frozen                     as given, or the actor's weights at the start (no second copy)
critic      trains                     as given, or the reward model, or the actor's trunk with a zero head
reward      frozen                     as given, or none where Python functions score

Only ids that all four know, and that are tokens of the actor's tokenizer, are sampled: actor and reference have no
probability on others, in sampling, log-probs and entropy alike.
"""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jax_rlhf.hub import Pretrained, other_ids
from jax_rlhf.hub.load_model import sampled_ids
from jax_rlhf.models import Decoder, DecoderConfig, abstract_params, narrowed
from jax_rlhf.models.decoder import Params as ModelParams
from jax_rlhf.models.split import SplitModel, SplitParams
from jax_rlhf.parallel import Layout, padded_vocab_size
from jax_rlhf.ppo.models import Frozen, Models, Params, Trainable


@dataclasses.dataclass(frozen=True)
class InitialModels:
    """What the four models start as; parameters may be `jax.ShapeDtypeStruct`s, for a plan.

    Attributes:
      actor, reference: with LM heads; None = the actor's weights.
      critic, reward: with scalar heads; None = as the module says.
      trainable_layers, critic_trainable_layers: from the top; None = all parameters.
      critic_zero_head: the critic's head starts at zero, whatever it starts as.
      offloaded: of "reference" and "reward", those whose parameters wait in host memory.
      reference_config, critic_config: how these run (dtype, remat, attention) where they start as another model; None =
        as that one.
    """

    actor: Pretrained
    reference: Pretrained | None = None
    critic: Pretrained | None = None
    reward: Pretrained | None = None
    trainable_layers: int | None = None
    critic_trainable_layers: int | None = None
    critic_zero_head: bool = False
    offloaded: tuple[str, ...] = ()
    reference_config: DecoderConfig | None = None
    critic_config: DecoderConfig | None = None


def pad_vocabularies(start: InitialModels, layout: Layout | None) -> InitialModels:
    """Models whose vocabularies the mesh divides, as `load_pretrained` makes them: zeros past the last id's row.

    Args:
      start: what the models start as.
      layout: the mesh; None = one device.

    Returns:
      The same models.
    """
    if layout is None:
        return start

    def config(given: DecoderConfig | None) -> DecoderConfig | None:
        return given and given.replace(padded_vocab_size=padded_vocab_size(given.table_rows, layout))

    def model(given: Pretrained | None) -> Pretrained | None:
        if given is None or given.model.config.table_rows % layout.num_shards("vocab") == 0:
            return given
        wide = given.model.clone(config=config(given.model.config))
        return dataclasses.replace(given, model=wide, params=jax.tree.map(_grown, given.params, abstract_params(wide)))

    models = {role: model(getattr(start, role)) for role in ("actor", "reference", "critic", "reward")}
    configs = {name: config(getattr(start, name)) for name in ("reference_config", "critic_config")}
    return dataclasses.replace(start, **models, **configs)


def _grown(leaf: Float[jax.Array, "..."], wide: jax.ShapeDtypeStruct) -> Float[jax.Array, "..."]:
    return jnp.pad(leaf, [(0, new - old) for old, new in zip(leaf.shape, wide.shape, strict=True)])


def create_models(start: InitialModels, layout: Layout | None) -> Models:
    """The models, on a mesh.

    Args:
      start: what they start as. A model in float16 computes in float32 on CPU, else in bfloat16: gradients of float16
        underflow.
      layout: the mesh; None = one device.

    Returns:
      The models.

    Raises:
      ValueError: layers out of range.
    """
    known = min(given.model.config.vocab_size for given in _given(start))

    def network(pretrained: Pretrained, layers: int | None = None, runs_as: DecoderConfig | None = None) -> SplitModel:
        config = pretrained.model.config if runs_as is None else runs_as
        if config.dtype == jnp.float16:
            config = config.replace(dtype=jnp.float32 if config.platform == "cpu" else jnp.bfloat16)
        if pretrained.model.head == "lm":
            config = sampled_ids(config, start.actor.tokenizer, known)
        return SplitModel(on_layout(pretrained.model.clone(config=config), layout), layers)

    actor = network(start.actor, start.trainable_layers)
    critic_start, critic_layers = start.critic or start.reward or _zero_head(start.actor), start.critic_trainable_layers
    critic = network(critic_start, critic_layers, start.critic_config if start.critic is None else None)
    alone = start.critic is None and start.reward is None
    if start.reference is None:
        reference = network(start.actor, start.trainable_layers, start.reference_config)
    else:
        reference = network(start.reference)
    reward = None
    if start.reward is not None:
        reward = network(start.reward, critic_layers if start.critic is None else None)
    return Models(
        actor=actor,
        reference=reference,
        critic=critic,
        reward=reward,
        reference_shares=start.reference is None,
        critic_shares=alone
        and critic.first_layer == actor.first_layer
        and None not in (start.trainable_layers, start.critic_trainable_layers),
        reward_shares=start.reward is not None and start.critic is None,
        offloaded=tuple(role for role in start.offloaded if role == "reference" or start.reward is not None),
    )


def _given(start: InitialModels) -> list[Pretrained]:
    return [given for given in (start.actor, start.reference, start.critic, start.reward) if given is not None]


def on_layout(model: Decoder, layout: Layout | None) -> Decoder:
    """The same model on a mesh.

    Args:
      model: the model.
      layout: the mesh; None = as it is.

    Returns:
      The model.
    """
    return model if layout is None else model.clone(config=model.config.replace(layout=layout))


def create_params(models: Models, start: InitialModels) -> Params:
    """The four models' parameters in a frozen and a trained part each; what two of them have in common is held once.

    Args:
      models: of the same start.
      start: the parameters.

    Returns:
      Their parameters: what trains is a copy in float32, since its buffers are donated to every update; what does not
      is in no wider a dtype than it is computed in.
    """
    critic_start = start.critic or start.reward or _zero_head(start.actor)
    actor = models.actor.split(_on_mesh(start.actor, models.actor))
    critic = models.critic.split(_on_mesh(critic_start, models.critic))

    def held(part: ModelParams, network: SplitModel, role: str) -> SplitParams:
        frozen = SplitParams({}, narrowed(part, network.compute_dtypes().trainable))
        return jax.device_put(frozen, jax.memory.Space.Host) if role in models.offloaded else frozen

    reference, reward = actor.trainable, None
    if not models.reference_shares:
        assert start.reference is not None, "the models are of another start"
        reference = _on_mesh(start.reference, models.reference)
    reference = held(reference, models.reference, "reference")
    if models.reward is not None:
        assert start.reward is not None, "the models are of another start"
        reward = critic.trainable if models.reward_shares else _on_mesh(start.reward, models.reward)
        reward = held(reward, models.reward, "reward")
    actor, critic = _frozen_narrowed(models, actor, critic)

    # The critic values unfinished responses, so it starts without the bonus that the reward model gives for those.
    learned = start.critic or start.reward
    critic_bias = learned.reward_bias - learned.missing_eos_bias if learned is not None else 0.0
    critic_trainable = critic.trainable
    if start.critic_zero_head:
        zero = jax.tree.map(jnp.zeros_like, critic_trainable["scalar_head"])
        critic_trainable, critic_bias = critic_trainable | {"scalar_head": zero}, 0.0
    frozen = Frozen(
        actor=actor.frozen,
        critic=critic.frozen,
        reference=reference,
        reward=reward,
        reward_bias=jnp.float32(start.reward.reward_bias if start.reward is not None else 0),
        critic_bias=jnp.float32(critic_bias),
        missing_eos_bias=jnp.float32(start.reward.missing_eos_bias if start.reward is not None else 0),
    )
    return Params(Trainable(_copies(actor.trainable), _copies(critic_trainable), None), frozen)


def _frozen_narrowed(models: Models, actor: SplitParams, critic: SplitParams) -> tuple[SplitParams, SplitParams]:
    """Actor and critic with frozen layers as wide as the widest of the models that run them computes."""
    actors, critics = [models.actor], [models.critic]
    if models.reference_shares:
        actors.append(models.reference)
    if models.reward is not None and models.reward_shares:
        critics.append(models.reward)
    if models.critic_shares:
        actors, critics = actors + critics, actors + critics

    def narrow(params: SplitParams, users: list[SplitModel]) -> SplitParams:
        config = users[0].model.config
        config = config.replace(dtype=jnp.result_type(*(user.model.config.dtype for user in users)))
        network = dataclasses.replace(users[0], model=users[0].model.clone(config=config))
        return params.replace(frozen=narrowed(params.frozen, network.compute_dtypes().frozen))

    actor = narrow(actor, actors)
    return actor, critic.replace(frozen=actor.frozen) if models.critic_shares else narrow(critic, critics)


@jax.jit
def _copies(params: ModelParams) -> ModelParams:
    return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), params)


def _on_mesh(pretrained: Pretrained, network: SplitModel) -> ModelParams:
    layout = network.model.config.layout
    return pretrained.params if layout is None else jax.device_put(pretrained.params, whole_shardings(network, layout))


def whole_shardings(network: SplitModel, layout: Layout) -> ModelParams:
    """The sharding of a whole model's parameters.

    Args:
      network: the model.
      layout: the mesh.

    Returns:
      `NamedSharding`s.

    Raises:
      ValueError: the mesh does not divide one; says which sizes would.
    """
    return SplitModel(network.model).shardings(layout).trainable


def trainable_shardings(models: Models, layout: Layout, *, moving_average: bool = False) -> Trainable:
    """The sharding of what updates change.

    Args:
      models: the models.
      layout: the mesh.
      moving_average: whether one is kept.

    Returns:
      `NamedSharding`s.
    """
    actor = models.actor.shardings(layout).trainable
    return Trainable(actor, models.critic.shardings(layout).trainable, actor if moving_average else None)


def frozen_shardings(models: Models, layout: Layout) -> Frozen:
    """The sharding of what no update changes, pinned host memory for what is offloaded.

    Args:
      models: the models.
      layout: the mesh.

    Returns:
      `NamedSharding`s.
    """
    actor, critic = models.actor.shardings(layout), models.critic.shardings(layout)
    reference, reward = SplitParams({}, actor.trainable), None
    if not models.reference_shares:
        reference = SplitParams({}, whole_shardings(models.reference, layout))
    if models.reward_shares:
        reward = SplitParams({}, critic.trainable)
    elif models.reward is not None:
        reward = SplitParams({}, whole_shardings(models.reward, layout))
    host = lambda sharding: sharding.with_memory_kind("pinned_host")  # noqa: E731
    if "reference" in models.offloaded:
        reference = jax.tree.map(host, reference)
    if "reward" in models.offloaded:
        reward = jax.tree.map(host, reward)
    replicated = cast(Any, layout.sharding(()))  # where an array is, in the same tree
    return Frozen(actor.frozen, critic.frozen, reference, reward, replicated, replicated, replicated)


def _zero_head(actor: Pretrained) -> Pretrained:
    """The actor's trunk with a scalar head of zeros."""
    model = Decoder(actor.model.config, head="scalar", scan_layers=actor.model.scan_layers)
    head = {"kernel": jnp.zeros((model.config.output_size, 1), jnp.float32)}
    trunk = {name: value for name, value in actor.params.items() if name != "lm_head"}
    return Pretrained(model, trunk | {"scalar_head": head}, actor.tokenizer)


def check_compatible(start: InitialModels) -> None:
    """Raises where the four models do not fit together.

    Args:
      start: what they start as.

    Raises:
      ValueError: a wrong head, or another tokenizer; says whose.
    """
    heads = {"actor": "lm", "reference": "lm", "critic": "scalar", "reward": "scalar"}
    actor = start.actor
    tokens = 0 if actor.tokenizer is None else len(actor.tokenizer)
    for role, wanted in heads.items():
        given = getattr(start, role)
        if given is None:
            continue
        if given.model.head != wanted:
            raise ValueError(f'{role} has a {given.model.head!r} head; load it with head="{wanted}".')
        differ = actor.tokenizer and given.tokenizer and other_ids(actor.tokenizer, given.tokenizer)
        if differ:
            raise ValueError(
                f"{role} has another tokenizer than the actor ({differ}). Token ids are carried from one to the other, "
                "never made again from text: use a model of the same tokenizer (it may have more tokens), or score "
                "texts with a reward function."
            )
        if role != "actor" and given.model.config.vocab_size < tokens:
            raise ValueError(f"{role} knows {given.model.config.vocab_size} tokens, the tokenizer has {tokens}.")
