"""Initial weights of the four models: from checkpoints to the trainable and frozen parameters of PPO.

            training    initial weights
actor       trainable   as given
reference   frozen      as given, or the actor's (frozen layers are shared with it)
critic      trainable   as given, or the reward model's, or the actor's trunk with a zero head
reward      frozen      as given, or no reward model if only Python functions score

Only ids in the vocabularies of all four models that are tokens of the actor's tokenizer are sampled. For actor and
reference all other ids have probability 0, in sampling, log-probs and entropy alike.
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
    """The initial weights of the four models; parameters may be `jax.ShapeDtypeStruct`s, for a plan.

    Attributes:
      actor, reference: with LM heads; reference=None = the actor's weights.
      critic, reward: with scalar heads; None = see the module's docstring.
      trainable_layers, critic_trainable_layers: from the top; None = all parameters.
      critic_zero_head: the critic's head starts at zero, whatever its initial weights.
      offloaded: of "reference" and "reward", those stored in host memory between uses.
      reference_config, critic_config: dtype, remat and attention of these models if they start from another model's
        weights; None = those of that model.
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
    """Pads embedding tables and LM heads with zero rows until the mesh divides them, as `load_pretrained` does."""
    if layout is None:
        return start

    def config(given: DecoderConfig | None) -> DecoderConfig | None:
        return given and given.replace(padded_vocab_size=padded_vocab_size(given.table_rows, layout))

    def model(given: Pretrained | None) -> Pretrained | None:
        if given is None or given.model.config.table_rows % layout.num_shards("vocab") == 0:
            return given
        padded = given.model.clone(config=config(given.model.config))
        params = jax.tree.map(_pad_to, given.params, abstract_params(padded))
        return dataclasses.replace(given, model=padded, params=params)

    models = {role: model(getattr(start, role)) for role in ("actor", "reference", "critic", "reward")}
    configs = {name: config(getattr(start, name)) for name in ("reference_config", "critic_config")}
    return dataclasses.replace(start, **models, **configs)


def _pad_to(leaf: Float[jax.Array, "..."], padded: jax.ShapeDtypeStruct) -> Float[jax.Array, "..."]:
    return jnp.pad(leaf, [(0, new - old) for old, new in zip(leaf.shape, padded.shape, strict=True)])


def create_models(start: InitialModels, layout: Layout | None) -> Models:
    """The models without their parameters, on a mesh.

    Args:
      start: the initial models. A model in float16 computes in float32 on CPU and in bfloat16 elsewhere, because
        float16 gradients underflow.
      layout: the mesh; None = one device.

    Raises:
      ValueError: layers out of range.
    """
    vocab_size = min(given.model.config.vocab_size for given in _given(start))  # ids that all models have

    def network(pretrained: Pretrained, layers: int | None = None, runs_as: DecoderConfig | None = None) -> SplitModel:
        config = pretrained.model.config if runs_as is None else runs_as
        if config.dtype == jnp.float16:
            config = config.replace(dtype=jnp.float32 if config.platform == "cpu" else jnp.bfloat16)
        if pretrained.model.head == "lm":
            config = sampled_ids(config, start.actor.tokenizer, vocab_size)
        return SplitModel(on_layout(pretrained.model.clone(config=config), layout), layers)

    actor = network(start.actor, start.trainable_layers)
    critic_start, critic_layers = start.critic or start.reward or _zero_head(start.actor), start.critic_trainable_layers
    critic = network(critic_start, critic_layers, start.critic_config if start.critic is None else None)
    critic_from_actor = start.critic is None and start.reward is None
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
        critic_shares=critic_from_actor
        and critic.first_layer == actor.first_layer
        and None not in (start.trainable_layers, start.critic_trainable_layers),
        reward_shares=start.reward is not None and start.critic is None,
        offloaded=tuple(role for role in start.offloaded if role == "reference" or start.reward is not None),
    )


def _given(start: InitialModels) -> list[Pretrained]:
    return [given for given in (start.actor, start.reference, start.critic, start.reward) if given is not None]


def on_layout(model: Decoder, layout: Layout | None) -> Decoder:
    """The model with this layout in its config; unchanged if layout is None."""
    return model if layout is None else model.clone(config=model.config.replace(layout=layout))


def create_params(models: Models, start: InitialModels) -> Params:
    """The parameters of the four models, split into frozen and trainable; shared parameters are stored once.

    Trainable parameters are float32 copies, since every update donates their buffers. Frozen parameters are stored in
    the dtype that they are computed in, unless theirs is narrower.

    Args:
      models: from `create_models` with the same `start`.
      start: the initial weights.
    """
    critic_start = start.critic or start.reward or _zero_head(start.actor)
    actor = models.actor.split(_on_mesh(start.actor, models.actor))
    critic = models.critic.split(_on_mesh(critic_start, models.critic))

    def frozen_params(part: ModelParams, network: SplitModel, role: str) -> SplitParams:
        frozen = SplitParams({}, narrowed(part, network.compute_dtypes().trainable))
        return jax.device_put(frozen, jax.memory.Space.Host) if role in models.offloaded else frozen

    reference, reward = actor.trainable, None
    if not models.reference_shares:
        assert start.reference is not None, "models and start do not match"
        reference = _on_mesh(start.reference, models.reference)
    reference = frozen_params(reference, models.reference, "reference")
    if models.reward is not None:
        assert start.reward is not None, "models and start do not match"
        reward = critic.trainable if models.reward_shares else _on_mesh(start.reward, models.reward)
        reward = frozen_params(reward, models.reward, "reward")
    actor, critic = _narrow_frozen(models, actor, critic)

    # The critic values unfinished responses, whose reward model scores are reduced by missing_eos_bias.
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


def _narrow_frozen(models: Models, actor: SplitParams, critic: SplitParams) -> tuple[SplitParams, SplitParams]:
    """Casts the frozen layers of actor and critic to the widest dtype that any model sharing them computes in."""
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
    """The `NamedSharding`s of all parameters of a model in one tree, not split.

    Raises:
      ValueError: the mesh does not divide a parameter; the message lists sizes that would work.
    """
    return SplitModel(network.model).shardings(layout).trainable


def trainable_shardings(models: Models, layout: Layout, *, moving_average: bool = False) -> Trainable:
    """The `NamedSharding`s of the trainable parameters; `moving_average` includes the actor's moving average."""
    actor = models.actor.shardings(layout).trainable
    return Trainable(actor, models.critic.shardings(layout).trainable, actor if moving_average else None)


def frozen_shardings(models: Models, layout: Layout) -> Frozen:
    """The `NamedSharding`s of the frozen parameters; those of offloaded models are in pinned host memory."""
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
    replicated = cast(Any, layout.sharding(()))  # a sharding in the field of an array
    return Frozen(actor.frozen, critic.frozen, reference, reward, replicated, replicated, replicated)


def _zero_head(actor: Pretrained) -> Pretrained:
    """The actor's trunk with a scalar head of zeros."""
    model = Decoder(actor.model.config, head="scalar", scan_layers=actor.model.scan_layers)
    head = {"kernel": jnp.zeros((model.config.output_size, 1), jnp.float32)}
    trunk = {name: value for name, value in actor.params.items() if name != "lm_head"}
    return Pretrained(model, trunk | {"scalar_head": head}, actor.tokenizer)


def check_compatible(start: InitialModels) -> None:
    """Checks that the four models can be used together.

    Raises:
      ValueError: a model has the wrong head, a different tokenizer or too few ids; the message names it.
    """
    heads = {"actor": "lm", "reference": "lm", "critic": "scalar", "reward": "scalar"}
    actor = start.actor
    tokens = 0 if actor.tokenizer is None else len(actor.tokenizer)
    for role, head in heads.items():
        given = getattr(start, role)
        if given is None:
            continue
        if given.model.head != head:
            raise ValueError(f'{role} has a {given.model.head!r} head; load it with head="{head}".')
        difference = actor.tokenizer and given.tokenizer and other_ids(actor.tokenizer, given.tokenizer)
        if difference:
            raise ValueError(
                f"{role} has another tokenizer than the actor ({difference}). All models read the actor's token ids, "
                "which are not tokenized again: use a model with the same tokenizer (it may have more tokens), or "
                "score texts with a reward function."
            )
        if role != "actor" and given.model.config.vocab_size < tokens:
            size = given.model.config.vocab_size
            raise ValueError(f"{role} has a vocabulary of {size} ids, but the tokenizer has {tokens} tokens.")
