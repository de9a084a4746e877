"""The four models of PPO on one mesh, and the jitted functions over them; `training/roles.py` says who starts as what.

With `trainable_layers=k` the layers below the top k are frozen, held once, and shared: by actor and reference, by
critic and reward model where the one started as the other, by actor and critic where the critic started as the actor.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from absl import logging
from jax import Array
from jax.sharding import Mesh

from jax_rlhf.hub import CheckpointError, Pretrained, load_pretrained
from jax_rlhf.models import model_jit
from jax_rlhf.models.config import AttentionForm, DecoderConfig, RematPolicy
from jax_rlhf.models.decoder import Head, Params
from jax_rlhf.models.flash import check_flash
from jax_rlhf.models.split import SplitModel, SplitParams
from jax_rlhf.parallel import Layout, as_layout
from jax_rlhf.rollout import Samples, Sampling
from jax_rlhf.settings import from_mapping
from jax_rlhf.training.collect import sample_responses
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
from jax_rlhf.training.roles import Start, assign_parameters, check_start, networks_of, padded, trained_places


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Where one model comes from, and how it runs.

    Attributes:
      path: a folder, a .gguf file or a hub id; None = as the module's docstring says.
      revision: of a hub id.
      trainable_layers: from the top; None = all parameters train (actor and critic). The reward model is cut where the
        critic is.
      dtype: "float32" or "bfloat16", of computing and of saved models; None = bfloat16 on GPU and TPU, float32 on CPU.
      remat: what the backward pass computes again: "none", "full" or "dots"; None = "dots" on CPU, as fast as "none"
        in less memory, else "full".
      attention: "xla", or "flash": cuDNN's or splash, which hold no scores, where it runs on GPU or TPU; None = "xla".

    A reference or critic without a path, which starts as another model, has these three as set for it, and where they
    are None, as config.model has them.
    """

    path: str | None = None
    revision: str | None = None
    trainable_layers: int | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    remat: RematPolicy | None = None
    attention: AttentionForm | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CriticConfig(ModelConfig):
    """The critic.

    Attributes:
      zero_head: its values start at 0, and only its trunk is what `path` (or the reward model) says. A reward model
        learned from whole answers; what its head says of unfinished ones can be a worse baseline than none.

    Source of the zero head: Ziegler et al. 2019, "Fine-tuning language models from human preferences", their code.
    """

    zero_head: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrozenConfig(ModelConfig):
    """Reference or reward model.

    Attributes:
      offload: its parameters wait in the host's memory and come to the devices to score; what it shares with the actor
        or the critic stays there.
    """

    offload: bool = False


_KINDS = {"model": ModelConfig, "reference": FrozenConfig, "critic": CriticConfig, "reward": FrozenConfig}


class RLHFEngine:
    """Actor, reference, critic and reward model on one mesh.

    Attributes:
      networks: the models.
      trained: parameters that PPO updates; the trainer replaces it after every update.
      frozen: parameters that it does not.
      tokenizer: the actor's, or None.
      layout: the mesh, and what lies where on it; None = one device.
    """

    def __init__(
        self,
        actor: Pretrained,
        *,
        reference: Pretrained | None = None,
        critic: Pretrained | None = None,
        reward: Pretrained | None = None,
        trainable_layers: int | None = None,
        critic_trainable_layers: int | None = None,
        critic_zero_head: bool = False,
        offloaded: Sequence[str] = (),
        reference_config: DecoderConfig | None = None,
        critic_config: DecoderConfig | None = None,
        mesh: Mesh | Layout | None = None,
    ) -> None:
        """Builds the engine from parameters in memory; arguments are copied where they train, else shared.

        Args:
          actor: with an LM head.
          reference: with an LM head; None = the actor's weights.
          critic: with a scalar head; None = the reward model's weights, or the actor's trunk with a zero head.
          reward: with a scalar head; None = no reward model.
          trainable_layers, critic_trainable_layers: from the top; None = all parameters.
          critic_zero_head: the critic's head starts at zero, whatever it starts as.
          offloaded: of "reference" and "reward", those whose parameters wait in host memory between uses.
          reference_config, critic_config: how these run (dtype, remat, attention) where they start as another model;
            None = as that one.
          mesh: the mesh; None = one device. A vocabulary that it does not divide gets zero rows, which are not saved.

        Raises:
          ValueError: a wrong head, layers out of range, another tokenizer, or a size that the mesh does not divide.
        """
        self.layout = as_layout(mesh)
        layers = trainable_layers, critic_trainable_layers
        runs = reference_config, critic_config
        start = Start(actor, reference, critic, reward, *layers, critic_zero_head, tuple(offloaded), *runs)
        check_start(start)
        start = padded(start, self.layout)
        self.networks = networks_of(start, self.layout)
        self.trained, self.frozen = assign_parameters(self.networks, start)
        if self.layout is not None:
            # Held to their devices, as an update returns them: else the second iteration would compile everything anew.
            places = trained_places(self.networks, self.layout)
            self.trained = jax.device_put(self.trained, places)
        else:
            self.trained = jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding), self.trained)
        self._decoder = start.actor.model.config  # with all ids that it knows, for what is saved
        self.tokenizer = actor.tokenizer
        self.generation_config = actor.generation_config

    @classmethod
    def create(cls, config: Any, mesh: Mesh | Layout | None = None) -> "RLHFEngine":
        """Loads the models that a config names.

        Args:
          config: a mapping with `model` and, where wanted, `reference`, `critic`, `reward`, each with `ModelConfig`'s
            fields (`critic` with `CriticConfig`'s); other entries (`ppo`, …) are not looked at.
          mesh: the mesh; None = one device.

        Returns:
          The engine.

        Raises:
          ValueError: an unknown field or a wrong value; says which.
          FileNotFoundError, CheckpointError: a checkpoint cannot be used.
        """
        roles = {role: from_mapping(kind, config.get(role) or {}, f"config.{role}") for role, kind in _KINDS.items()}
        if roles["model"].path is None:
            raise ValueError("config.model.path is not set; it names the actor's checkpoint.")
        if roles["reference"].trainable_layers or roles["reward"].trainable_layers:
            raise ValueError(
                "trainable_layers is a field of config.model and config.critic; reference and reward model are frozen "
                "in PPO and are cut where the actor and the critic are."
            )
        check_roles(roles)
        load = functools.partial(load_model, mesh=mesh)
        actor, reward = load(roles["model"], "lm"), load(roles["reward"], "scalar")
        if reward is not None and reward.new_head:
            raise CheckpointError(headless(roles["reward"].path))
        return cls(
            actor,
            reference=load(roles["reference"], "lm"),
            critic=load(roles["critic"], "scalar"),
            reward=reward,
            reference_config=running_as(actor.model.config, roles["reference"], roles["model"]),
            critic_config=running_as((reward or actor).model.config, roles["critic"], roles["model"]),
            trainable_layers=roles["model"].trainable_layers,
            critic_trainable_layers=roles["critic"].trainable_layers,
            critic_zero_head=roles["critic"].zero_head,
            offloaded=[role for role in ("reference", "reward") if roles[role].offload],
            mesh=mesh,
        )

    @property
    def actor(self) -> Pretrained:
        """The actor as it is now, for `save_pretrained`."""
        return self._pretrained(self.networks.actor, self.frozen.actor, self.trained.actor)

    @property
    def actor_ema(self) -> Pretrained:
        """The actor's moving average."""
        if self.trained.actor_ema is None:
            raise ValueError("no moving average is kept; set config.ppo.ema_decay.")
        return self._pretrained(self.networks.actor, self.frozen.actor, self.trained.actor_ema)

    @property
    def critic(self) -> Pretrained:
        """The critic as it is now."""
        critic = self._pretrained(self.networks.critic, self.frozen.critic, self.trained.critic)
        return dataclasses.replace(critic, generation_config=None, reward_bias=float(self.frozen.critic_bias))

    def _pretrained(self, network: SplitModel, frozen: Params, trainable: Params) -> Pretrained:
        params, model = _join(network, SplitParams(frozen, trainable)), network.model
        if model.head == "lm":
            known = {"vocab_size": self._decoder.vocab_size, "absent_ids": self._decoder.absent_ids}
            model = model.clone(config=model.config.replace(**known))
        return Pretrained(model, params, self.tokenizer, self.generation_config)

    def sample(self, prompts: Array, prompt_mask: Array, row_ids: Array, key: Array, sampling: Sampling) -> Samples:
        """The actor's responses; arguments as in `jax_rlhf.sample`."""
        return _sample(self.networks, sampling, self.trained, self.frozen, prompts, prompt_mask, row_ids, key)

    def score(
        self, tokens: Array, mask: Array, *, start: int = 1, temperature: float = 1.0
    ) -> tuple[Array, Array, Array]:
        """Log-probs of tokens[:, start:] by actor and reference, the actor's entropy: float32[B, T − start] each."""
        return _score(self.networks, start, temperature, self.trained, self.frozen, tokens, mask)

    def values(self, tokens: Array, mask: Array) -> Array:
        """The critic's value of the state that each token leads to, float32[B, T]."""
        return _values(self.networks, self.trained, self.frozen, tokens, mask)

    def reward(self, tokens: Array, mask: Array) -> Array:
        """The reward model's score of each text, float32[B]; whether it ends in EOS is not looked at."""
        if self.networks.reward is None:
            raise ValueError("the engine has no reward model; give config.reward.path.")
        return _reward(self.networks, self.frozen, tokens, mask)


# ---- the jitted functions ------------------------------------------------------------------------------------------

_sample = model_jit(sample_responses, static_argnums=(0, 1))


@functools.partial(model_jit, static_argnums=(0, 1, 2))
def _score(
    networks: Networks, start: int, temperature: float, trained: Trained, frozen: Frozen, tokens: Array, mask: Array
) -> tuple[Array, Array, Array]:
    frozen = networks.fetched(frozen)
    bottom = boundaries(networks, frozen, tokens, mask).actor
    how = {"start": start, "temperature": temperature, "chunk": None}
    actor = SplitParams(frozen.actor, trained.actor)
    logprobs, entropy = policy_logprobs(networks.actor, actor, tokens, mask, bottom, **how)
    ref_logprobs = reference_logprobs(networks, frozen, tokens, mask, bottom, **how)
    return logprobs, ref_logprobs, entropy


@functools.partial(model_jit, static_argnums=0)
def _values(networks: Networks, trained: Trained, frozen: Frozen, tokens: Array, mask: Array) -> Array:
    critic = SplitParams(frozen.critic, trained.critic)
    return critic_values(networks.critic, critic, tokens, mask, None, start=1, bias=frozen.critic_bias)


@functools.partial(model_jit, static_argnums=0)
def _reward(networks: Networks, frozen: Frozen, tokens: Array, mask: Array) -> Array:
    return reward_scores(networks, networks.fetched(frozen), tokens, mask, None)


# ---- building ------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def _join(network: SplitModel, params: SplitParams) -> Params:
    return jax.tree.map(jnp.copy, network.join(params))  # not the buffers that the next update is given


def headless(path: str) -> str:
    """What to say of a reward model without a scalar head.

    Args:
      path: its folder, file or hub id.

    Returns:
      A message.
    """
    return (
        f"config.reward.path={path} is a language model: it has no scalar head (score.weight), so every text would "
        "score 0. The reward phase makes a reward model of it: --config.phases=reward --config.reward_training.path=…"
    )


def load_model(
    config: ModelConfig, head: Head, mesh: Mesh | Layout | None = None, *, key: Array | None = None
) -> Pretrained | None:
    """Loads a model to run as a config says.

    Args:
      config: its fields.
      head: "lm" or "scalar".
      mesh: the mesh; None = one device.
      key: of a new scalar head, as in `load_pretrained`.

    Returns:
      The model; None where config.path is None.

    Raises:
      FileNotFoundError, CheckpointError: the checkpoint cannot be used.
    """
    if config.path is None:
        return None
    pretrained = load_pretrained(config.path, head=head, mesh=mesh, revision=config.revision, key=key)
    model = pretrained.model.clone(config=running(pretrained.model.config, config))
    return dataclasses.replace(pretrained, model=model)


def running(decoder: DecoderConfig, config: ModelConfig) -> DecoderConfig:
    """How a model runs on its devices.

    Args:
      decoder: as loaded.
      config: what is wanted; None = what suits the devices.

    Returns:
      The decoder's config with dtype, remat and form of attention.

    Raises:
      ValueError: flash attention that this model cannot have there.
    """
    on_cpu = decoder.platform == "cpu"
    dtype = config.dtype or ("float32" if on_cpu else "bfloat16")
    remat = config.remat or ("dots" if on_cpu else "full")
    decoder = decoder.replace(dtype=dtype, remat=remat, attention=config.attention or "xla")
    check_flash(decoder)
    return decoder


def running_as(decoder: DecoderConfig, config: ModelConfig, policy: ModelConfig) -> DecoderConfig | None:
    """How a reference or critic runs that starts as another model.

    Args:
      decoder: of the model that it starts as.
      config: its own settings.
      policy: the actor's, which count where its own are None.

    Returns:
      The decoder's config; None where the settings name a checkpoint, which runs as they say.

    Raises:
      ValueError: flash attention that this model cannot have there.
    """
    if config.path is not None:
        return None
    names = ("dtype", "remat", "attention")
    unset = {name: getattr(policy, name) for name in names if getattr(config, name) is None}
    return running(decoder, dataclasses.replace(config, **unset))


def check_roles(roles: Mapping[str, ModelConfig]) -> None:
    """Stops where a role has settings that nothing would read.

    Args:
      roles: "model", "reference", "critic", "reward" → settings.

    Raises:
      ValueError: says which, and what to do.
    """
    for role, config in roles.items():
        if config.path is None and config.revision is not None:
            raise ValueError(f"config.{role}.revision={config.revision!r} is of a hub id; set config.{role}.path too.")
    reward = roles["reward"]
    if reward.path is None and (reward.offload or reward.dtype or reward.remat or reward.attention):
        logging.warning("config.reward has no path, so no reward model runs: its other settings change nothing.")
