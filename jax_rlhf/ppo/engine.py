"""The four models of PPO on one mesh, and jitted functions that run them; `initialize.py` creates their parameters.

With `trainable_layers=k` the layers below the top k are frozen. Models with the same initial weights share one copy of
them: actor and reference, critic and reward model if the critic started as the reward model, and actor and critic if
the critic started as the actor.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Bool, Float32, Int, PRNGKeyArray

from jax_rlhf.hub import CheckpointError, Pretrained
from jax_rlhf.hub.config import ModelConfig
from jax_rlhf.hub.load_model import load_model, running_as
from jax_rlhf.models import model_jit
from jax_rlhf.models.config import DecoderConfig
from jax_rlhf.models.decoder import Head, Params as ModelParams
from jax_rlhf.models.split import SplitModel, SplitParams
from jax_rlhf.parallel import Layout, as_layout
from jax_rlhf.ppo.config import CriticConfig, FrozenConfig
from jax_rlhf.ppo.initialize import (
    InitialModels,
    check_compatible,
    create_models,
    create_params,
    pad_vocabularies,
    trainable_shardings,
)
from jax_rlhf.ppo.models import Models, Params
from jax_rlhf.ppo.step import make_sample
from jax_rlhf.rl import Batch, Prompts
from jax_rlhf.rl.types import AnyArray
from jax_rlhf.sampling import Samples, Sampling
from jax_rlhf.settings import from_mapping

_KINDS = {"model": ModelConfig, "reference": FrozenConfig, "critic": CriticConfig, "reward_model": FrozenConfig}


class RLHFEngine:
    """Actor, reference, critic and reward model on one mesh.

    Attributes:
      models: the four models, without their parameters.
      params: their parameters; the trainer replaces `params.trainable` after every update.
      tokenizer: the actor's, or None.
      layout: the mesh and its sharding rules; None = one device.
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
        """Builds the engine from parameters in memory. Trainable parameters are copied, frozen ones are shared.

        Args:
          actor: with an LM head.
          reference: with an LM head; None = the actor's weights.
          critic: with a scalar head; None = the reward model's weights, or the actor's trunk with a zero head.
          reward: with a scalar head; None = no reward model.
          trainable_layers, critic_trainable_layers: from the top; None = all parameters.
          critic_zero_head: the critic's head starts at zero, whatever its initial weights.
          offloaded: of "reference" and "reward", those stored in host memory between uses.
          reference_config, critic_config: dtype, remat and attention of these models if they start from another
            model's weights; None = those of that model.
          mesh: the mesh; None = one device. A vocabulary that the mesh does not divide is padded with zero rows, which
            are not saved.

        Raises:
          ValueError: a wrong head, layers out of range, a different tokenizer, or a size that the mesh does not divide.
        """
        self.layout = as_layout(mesh)
        layers = trainable_layers, critic_trainable_layers
        configs = reference_config, critic_config
        start = InitialModels(actor, reference, critic, reward, *layers, critic_zero_head, tuple(offloaded), *configs)
        check_compatible(start)
        start = pad_vocabularies(start, self.layout)
        self.models = create_models(start, self.layout)
        params = create_params(self.models, start)
        # Committed to their devices, as an update returns them: otherwise the second iteration would recompile.
        if self.layout is None:
            shardings = jax.tree.map(lambda leaf: leaf.sharding, params.trainable)
        else:
            shardings = trainable_shardings(self.models, self.layout)
        self.params = params.replace(trainable=jax.device_put(params.trainable, shardings))
        self._decoder = start.actor.model.config  # with the actor's full vocabulary, for saved models
        self.tokenizer = actor.tokenizer
        self.generation_config = actor.generation_config

    @classmethod
    def create(cls, config: Any, mesh: Mesh | Layout | None = None) -> "RLHFEngine":
        """Loads the models that a config names.

        Args:
          config: a mapping with `model` and, optionally, `reference`, `critic`, `reward_model`, each with the fields of
            `ModelConfig` (`critic`: of `CriticConfig`). Other entries (`ppo`, …) are ignored.
          mesh: the mesh; None = one device.

        Raises:
          ValueError: an unknown field or a wrong value; the message names it.
          FileNotFoundError, CheckpointError: a checkpoint cannot be used.
        """
        if "path" in (config.get("reward") or {}):
            raise ValueError("config.reward.path was renamed: PPO's reward model is config.reward_model.path.")
        roles = {role: from_mapping(kind, config.get(role) or {}, f"config.{role}") for role, kind in _KINDS.items()}
        if roles["model"].path is None:
            raise ValueError("config.model.path is not set; it is the actor's checkpoint.")
        if roles["reference"].trainable_layers or roles["reward_model"].trainable_layers:
            raise ValueError(
                "trainable_layers can be set in config.model and config.critic only; PPO freezes the reference and the "
                "reward model, and splits them at the same layer as the actor and the critic."
            )
        check_roles(roles)

        def load(role: str, head: Head) -> Pretrained | None:
            return None if roles[role].path is None else load_model(roles[role], head, mesh)

        actor, reward = load_model(roles["model"], "lm", mesh), load("reward_model", "scalar")
        if reward is not None and reward.new_head:
            raise CheckpointError(headless(roles["reward_model"].path))
        return cls(
            actor,
            reference=load("reference", "lm"),
            critic=load("critic", "scalar"),
            reward=reward,
            reference_config=running_as(actor.model.config, roles["reference"], roles["model"]),
            critic_config=running_as((reward or actor).model.config, roles["critic"], roles["model"]),
            trainable_layers=roles["model"].trainable_layers,
            critic_trainable_layers=roles["critic"].trainable_layers,
            critic_zero_head=roles["critic"].zero_head,
            offloaded=["reference"] * roles["reference"].offload + ["reward"] * roles["reward_model"].offload,
            mesh=mesh,
        )

    @property
    def actor(self) -> Pretrained:
        """The actor with its current parameters, for `save_pretrained`."""
        return self._pretrained(self.models.actor, self.params.actor)

    @property
    def actor_ema(self) -> Pretrained:
        """The actor with the moving average of its parameters."""
        average = self.params.trainable.actor_ema
        if average is None:
            raise ValueError("the engine has no moving average of the actor; set config.ppo.actor.ema_decay.")
        return self._pretrained(self.models.actor, self.params.with_actor(average).actor)

    @property
    def critic(self) -> Pretrained:
        """The critic with its current parameters."""
        critic = self._pretrained(self.models.critic, self.params.critic)
        bias = float(self.params.frozen.critic_bias)
        return dataclasses.replace(critic, generation_config=None, reward_bias=bias)

    def _pretrained(self, network: SplitModel, params: SplitParams) -> Pretrained:
        whole, model = _join(network, params), network.model
        if model.head == "lm":
            vocabulary = {"vocab_size": self._decoder.vocab_size, "absent_ids": self._decoder.absent_ids}
            model = model.clone(config=model.config.replace(**vocabulary))
        return Pretrained(model, whole, self.tokenizer, self.generation_config)

    def sample(
        self,
        prompts: Int[AnyArray, "B P"],
        prompt_mask: Bool[AnyArray, "B P"],
        row_ids: Int[AnyArray, "B"],
        key: PRNGKeyArray,
        sampling: Sampling,
    ) -> Samples:
        """Samples responses from the actor; arguments as in `jax_rlhf.sample`."""
        rows = Prompts(prompts, prompt_mask, row_ids, columns=None)
        return make_sample(self.models, sampling)(self.params, rows, key)

    def score(
        self, tokens: Int[AnyArray, "B T"], mask: Bool[AnyArray, "B T"], *, start: int = 1, temperature: float = 1.0
    ) -> tuple[Float32[Array, "B R"], Float32[Array, "B R"], Float32[Array, "B R"]]:
        """Log-probs of tokens[:, start:] by actor and reference, the actor's entropy, in nats; R = T − start."""
        return _make_score(self.models, temperature)(self.params, Batch(tokens, mask, start=start))

    def values(self, tokens: Int[AnyArray, "B T"], mask: Bool[AnyArray, "B T"]) -> Float32[Array, "B T"]:
        """The critic's value of the state after each token, in reward units."""
        return _make_values(self.models)(self.params, Batch(tokens, mask))

    def reward(self, tokens: Int[AnyArray, "B T"], mask: Bool[AnyArray, "B T"]) -> Float32[Array, "B"]:
        """The reward model's score of each text, in reward units, without a penalty for a missing EOS."""
        if self.models.reward is None:
            raise ValueError("the engine has no reward model; give config.reward_model.path.")
        return _make_reward(self.models)(self.params, Batch(tokens, mask))


# ---- the jitted functions ------------------------------------------------------------------------------------------


@functools.cache
def _make_score(models: Models, temperature: float) -> Callable[[Params, Batch], tuple[Array, Array, Array]]:
    def score(
        params: Params, batch: Batch
    ) -> tuple[Float32[Array, "B R"], Float32[Array, "B R"], Float32[Array, "B R"]]:
        params = models.fetch_offloaded(params)
        batch = batch.replace(frozen_activations=models.cache_frozen_activations(params, batch))
        logprobs, entropy = models.actor_logprobs(params, batch, temperature=temperature)
        return logprobs, models.reference_logprobs(params, batch, temperature=temperature), entropy

    return model_jit(score)


@functools.cache
def _make_values(models: Models) -> Callable[[Params, Batch], Array]:
    return model_jit(models.values)


@functools.cache
def _make_reward(models: Models) -> Callable[[Params, Batch], Array]:
    return model_jit(lambda params, batch: models.scores(models.fetch_offloaded(params), batch))


# ---- building ------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def _join(network: SplitModel, params: SplitParams) -> ModelParams:
    return jax.tree.map(jnp.copy, network.join(params))  # copies: the next update donates the original buffers


def headless(path: str) -> str:
    """The error message for a reward model without a scalar head; path: its folder, file or hub id."""
    return (
        f"config.reward_model.path={path} is a language model: it has no scalar head (score.weight), so every text "
        "would score 0. The reward phase trains a reward model: --config.phases=reward --config.reward.start_from=…"
    )


def check_roles(roles: Mapping[str, ModelConfig]) -> None:
    """Checks that a model without a path has no settings that would be ignored.

    Args:
      roles: "model", "reference", "critic", "reward_model" → settings.

    Raises:
      ValueError: a model has a revision and no path.
    """
    for role, config in roles.items():
        if config.path is None and config.revision is not None:
            raise ValueError(
                f"config.{role}.revision={config.revision!r} has no effect without a hub id; set config.{role}.path "
                "too."
            )
    reward = roles["reward_model"]
    offload = isinstance(reward, FrozenConfig) and reward.offload
    if reward.path is None and (offload or reward.dtype or reward.remat or reward.attention):
        logging.warning("config.reward_model has no path, so no reward model runs; its other settings have no effect.")
