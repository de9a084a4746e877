"""The four models of PPO: what they share, what is frozen, and what is asked of them.

    models = engine.models                              static: which models, what they share; hashable
    params = engine.params                              their parameters, a pytree

    models.actor_logprobs(params, batch, …)             log π, and the entropy
    models.reference_logprobs(params, batch, …)         log π_ref
    models.values(params, batch)                        the critic's
    models.scores(params, batch)                        the reward model's

With `trainable_layers=k` the layers below the top k are frozen. They exist once where two models started as the same
checkpoint, and their output, `cache_frozen_activations`, is computed once per rollout.

Sizes: B rows, P prompt slots, R response slots, T = P + R, D width.
"""

import dataclasses

import jax
import numpy as np
from flax import struct
from jax import Array
from jaxtyping import Bool, Float, Float32, Int

from jax_rlhf.models import Decoder
from jax_rlhf.models.decoder import Params as ModelParams
from jax_rlhf.models.split import SplitModel, SplitParams, last_token_values
from jax_rlhf.parallel import Layout
from jax_rlhf.rl.types import Batch, FrozenActivations
from jax_rlhf.sampling import check_positions, decodes_unrolled, reshard, score_hidden


class Trainable(struct.PyTreeNode):
    """What an update changes.

    Attributes:
      actor, critic: their trainable parameters, float32.
      actor_ema: moving average of the actor's, float32; None where none is kept.
    """

    actor: ModelParams
    critic: ModelParams
    actor_ema: ModelParams | None

    def with_average(self, decay: float | None) -> "Trainable":
        """The average moves where this trainer keeps one; another trainer's, kept by the engine, stays as it is."""
        if self.actor_ema is None or decay is None:
            return self
        average = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, self.actor_ema, self.actor)
        return self.replace(actor_ema=average)


class Frozen(struct.PyTreeNode):
    """What no update changes.

    Attributes:
      actor, critic: the frozen bottom layers of these models; empty dicts where everything trains.
      reference: the reference; its `frozen` is empty where it shares the actor's.
      reward: the reward model; its `frozen` is empty where it shares the critic's. None where there is none.
      reward_bias, critic_bias: added to what the heads say, in reward units. A reward model's gain is in its head, its
        bias here. A critic that starts as a reward model starts with its scores of unfinished texts.
      missing_eos_bias: subtracted from the reward model's scores of responses without EOS.
    """

    actor: ModelParams
    critic: ModelParams
    reference: SplitParams
    reward: SplitParams | None
    reward_bias: Float32[Array, ""]
    critic_bias: Float32[Array, ""]
    missing_eos_bias: Float32[Array, ""]


class Params(struct.PyTreeNode):
    """Parameters of the four models: what an update changes, and what it does not."""

    trainable: Trainable
    frozen: Frozen

    @property
    def actor(self) -> SplitParams:
        """The actor's."""
        return SplitParams(self.frozen.actor, self.trainable.actor)

    @property
    def critic(self) -> SplitParams:
        """The critic's."""
        return SplitParams(self.frozen.critic, self.trainable.critic)

    def with_actor(self, actor: ModelParams) -> "Params":
        """The same with other trainable parameters of the actor, to differentiate by them."""
        return self.replace(trainable=self.trainable.replace(actor=actor))

    def with_critic(self, critic: ModelParams) -> "Params":
        """The same with other trainable parameters of the critic."""
        return self.replace(trainable=self.trainable.replace(critic=critic))


@dataclasses.dataclass(frozen=True)
class Models:
    """The models without their parameters: hashable, so that jitted functions can close over them.

    Attributes:
      actor, reference: with LM heads.
      critic: with a scalar head.
      reward: with a scalar head; None where only functions over texts score.
      reference_shares: the reference's frozen bottom is the actor's.
      critic_shares: the critic's is the actor's.
      reward_shares: the reward model's is the critic's.
      offloaded: of "reference" and "reward", those whose parameters wait in host memory (not what they share).
      logprob_chunk: positions whose logits exist at once; None chooses.
    """

    actor: SplitModel
    reference: SplitModel
    critic: SplitModel
    reward: SplitModel | None
    reference_shares: bool
    critic_shares: bool
    reward_shares: bool
    offloaded: tuple[str, ...] = ()
    logprob_chunk: int | None = None

    @property
    def layout(self) -> Layout | None:
        """The mesh; None = one device."""
        return self.actor.model.config.layout

    def fetch_offloaded(self, params: Params) -> Params:
        """Brings what waits in host memory to the devices, under jit; before any loop that reads it."""
        frozen = params.frozen
        fetched = {role: jax.device_put(getattr(frozen, role), jax.memory.Space.Device) for role in self.offloaded}
        return params.replace(frozen=frozen.replace(**fetched))

    def cache_frozen_activations(self, params: Params, batch: Batch, *, critic: bool = True) -> FrozenActivations:
        """Runs the frozen bottoms of actor and critic, once for all that is asked later of the same tokens.

        Args:
          params: of the four models.
          batch: B rows.
          critic: whether the critic will be asked at all.

        Returns:
          The activations, None for a model that trains as a whole or is not asked.
        """
        actor = self.actor.frozen_activations(SplitParams(params.frozen.actor, {}), batch.tokens, batch.mask)
        if not critic:
            return FrozenActivations(actor)
        if self.critic_shares and _same_forward(self.critic, self.actor):
            return FrozenActivations(actor, actor)
        bottom = SplitParams(params.frozen.critic, {})
        return FrozenActivations(actor, self.critic.frozen_activations(bottom, batch.tokens, batch.mask))

    def actor_logprobs(
        self, params: Params, batch: Batch, *, temperature: float
    ) -> tuple[Float32[Array, "B R"], Float32[Array, "B R"]]:
        """Log-probs of the tokens from slot `batch.start` on, and the entropy of the distributions they are from.

        Args:
          params: of the four models.
          batch: B rows.
          temperature: τ, as sampled: the distribution is softmax(logits / τ).

        Returns:
          (logprobs, entropy) of R = T − start tokens, in nats. At pads they are unspecified.
        """
        return self._logprobs(self.actor, params.actor, batch, batch.frozen_activations.actor, temperature)

    def reference_logprobs(self, params: Params, batch: Batch, *, temperature: float) -> Float32[Array, "B R"]:
        """The reference's log-probs of the same tokens, in nats."""
        reference, activations = params.frozen.reference, None
        if self.reference_shares:
            reference = SplitParams(params.frozen.actor, reference.trainable)
            if _same_forward(self.reference, self.actor):
                activations = batch.frozen_activations.actor
        return self._logprobs(self.reference, reference, batch, activations, temperature)[0]

    def values(self, params: Params, batch: Batch) -> Float32[Array, "B states"]:
        """The critic's values of the states before each token from `batch.start` on, and after the last slot.

        Returns:
          Of T − start + 1 states, in reward units.
        """
        hidden = _hidden(self.critic, params.critic, batch, batch.frozen_activations.critic)
        hidden = hidden[:, batch.start - 1 :]  # [B, R + 1, D]
        head = {"params": self.critic.head_params(params.critic)}
        return self.critic.model.apply(head, hidden, method="apply_head") + params.frozen.critic_bias

    def scores(self, params: Params, batch: Batch) -> Float32[Array, "B"]:
        """The reward model's score of each row, read at its last real token, its bias added; in reward units."""
        network, reward, activations = self.reward, params.frozen.reward, None
        assert network is not None, "there is no reward model to ask"
        assert reward is not None, "the parameters are of other models"
        if self.reward_shares:
            reward = SplitParams(params.frozen.critic, reward.trainable)
            if _same_forward(network, self.critic):
                activations = batch.frozen_activations.critic
        hidden = _hidden(network, reward, batch, activations)
        return last_token_values(network, reward, hidden, batch.mask) + params.frozen.reward_bias

    def sampling_weights(self, params: Params) -> tuple[Decoder, ModelParams]:
        """The actor as the sampler runs it, (model, parameters): see `sampling/weights.py`."""
        model, weights = reshard(self.actor.model, params.actor, self.actor.axes())
        if decodes_unrolled(model.config):
            return model.clone(scan_layers=False), self.actor.unstack(weights)
        return model, self.actor.join(weights)

    def check_prompts(self, tokens: Int[np.ndarray, "B P"], mask: Bool[np.ndarray, "B P"], max_new_tokens: int) -> None:
        """Raises where one of the four models cannot run over these prompts and their responses.

        Args:
          tokens: ids, on the host.
          mask: True = real token.
          max_new_tokens: R, in tokens.

        Raises:
          ValueError: an id that not all models know, or a row that is longer than a table of positions; says which.
        """
        lengths, known = mask.sum(axis=1), self.actor.model.config.vocab_size
        unknown = mask & ((tokens < 0) | (tokens >= known))
        if unknown.any():
            row, column = np.argwhere(unknown)[0]
            raise ValueError(f"prompt {row} has the id {tokens[row, column]}; the models know {known} ids.")
        for role in ("actor", "reference", "critic", "reward"):
            network = getattr(self, role)
            if network is not None:
                check_positions(network.model.config, lengths, max_new_tokens, whose=f"{role}'s")

    def _logprobs(
        self,
        network: SplitModel,
        params: SplitParams,
        batch: Batch,
        activations: Float[Array, "B T D"] | None,
        temperature: float,
    ) -> tuple[Float32[Array, "B R"], Float32[Array, "B R"]]:
        hidden = _hidden(network, params, batch, activations)[:, batch.start - 1 : -1]  # [B, R, D], before each token
        targets, head = batch.tokens[:, batch.start :], network.head_params(params)
        return score_hidden(network.model, head, hidden, targets, temperature=temperature, chunk=self.logprob_chunk)


def _hidden(
    network: SplitModel, params: SplitParams, batch: Batch, activations: Float[Array, "B T D"] | None
) -> Float[Array, "B T E"]:
    """What the head reads; the frozen bottom runs here where its output is not given."""
    if activations is None:
        activations = network.frozen_activations(params, batch.tokens, batch.mask)
    return network.hidden_states(params, batch.tokens, batch.mask, activations)


def _same_forward(network: SplitModel, other: SplitModel) -> bool:
    """Whether two models of the same frozen bottom compute the same: in one dtype, by one form of attention."""
    config = other.model.config
    return network.model.config.replace(remat=config.remat) == config
