"""The four models of PPO: which parameters they share, which are frozen, and their forward passes.

    models = engine.models                              static and hashable: the architectures, and what they share
    params = engine.params                              the parameters, a pytree

    models.actor_logprobs(params, batch, …)             log π, and the entropy
    models.reference_logprobs(params, batch, …)         log π_ref
    models.values(params, batch)                        the critic's values
    models.scores(params, batch)                        the reward model's scores

With `trainable_layers=k` the layers below the top k are frozen. Models that started from the same checkpoint share one
copy of them, and their output is computed once per rollout (`cache_frozen_activations`).

Sizes: B rows, P prompt slots, R response slots, T = P + R, D hidden size, E width of the head's input.
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
    """The parameters that an update changes.

    Attributes:
      actor, critic: their trainable parameters, float32.
      actor_ema: exponential moving average of the actor's, float32; None if there is none.
    """

    actor: ModelParams
    critic: ModelParams
    actor_ema: ModelParams | None

    def with_average(self, decay: float | None) -> "Trainable":
        """Updates the moving average; with decay=None it is unchanged (another trainer of the engine owns it)."""
        if self.actor_ema is None or decay is None:
            return self
        average = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, self.actor_ema, self.actor)
        return self.replace(actor_ema=average)


class Frozen(struct.PyTreeNode):
    """The parameters that no update changes.

    Attributes:
      actor, critic: the frozen bottom layers of these models; empty dicts if all their layers train.
      reference: the reference; its `frozen` is empty if it shares the actor's.
      reward: the reward model; its `frozen` is empty if it shares the critic's. None without a reward model.
      reward_bias, critic_bias: added to the outputs of the scalar heads, in reward units. The gain of a reward model is
        part of its head, its bias is stored here. A critic that starts as a reward model starts with the bias for
        unfinished texts: reward_bias − missing_eos_bias.
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
    """Parameters of the four models."""

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
        """A copy with other trainable parameters of the actor, to differentiate with respect to them."""
        return self.replace(trainable=self.trainable.replace(actor=actor))

    def with_critic(self, critic: ModelParams) -> "Params":
        """A copy with other trainable parameters of the critic."""
        return self.replace(trainable=self.trainable.replace(critic=critic))


@dataclasses.dataclass(frozen=True)
class Models:
    """The models without their parameters: hashable, so that jitted functions can close over them.

    Attributes:
      actor, reference: with LM heads.
      critic: with a scalar head.
      reward: with a scalar head; None if all scores come from reward functions.
      reference_shares: the reference's frozen layers are the actor's.
      critic_shares: the critic's frozen layers are the actor's.
      reward_shares: the reward model's frozen layers are the critic's.
      offloaded: of "reference" and "reward", those stored in host memory between uses, except for shared layers.
      logprob_chunk: positions whose logits are in memory at once; None chooses.
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
        """Copies offloaded parameters to the devices. Call it under jit, before any loop that reads them."""
        frozen = params.frozen
        fetched = {role: jax.device_put(getattr(frozen, role), jax.memory.Space.Device) for role in self.offloaded}
        return params.replace(frozen=frozen.replace(**fetched))

    def cache_frozen_activations(self, params: Params, batch: Batch, *, critic: bool = True) -> FrozenActivations:
        """Runs the frozen layers of actor and critic, once for all later forward passes over the same tokens.

        Args:
          params: of the four models.
          batch: B rows.
          critic: False skips the critic.

        Returns:
          The activations; None for a model without frozen layers, and for a skipped critic.
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
        """Log-probs of the tokens from slot `batch.start` on, and the entropy of the predicted distributions.

        Args:
          params: of the four models.
          batch: B rows.
          temperature: τ of sampling: the distribution is softmax(logits / τ).

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
        hidden = hidden[:, batch.start - 1 :]  # [B, R + 1, E]
        head = {"params": self.critic.head_params(params.critic)}
        return self.critic.model.apply(head, hidden, method="apply_head") + params.frozen.critic_bias

    def scores(self, params: Params, batch: Batch) -> Float32[Array, "B"]:
        """The reward model's score of each row at its last real token, plus its bias; in reward units."""
        network, reward, activations = self.reward, params.frozen.reward, None
        assert network is not None, "there is no reward model"
        assert reward is not None, "the parameters have no reward model"
        if self.reward_shares:
            reward = SplitParams(params.frozen.critic, reward.trainable)
            if _same_forward(network, self.critic):
                activations = batch.frozen_activations.critic
        hidden = _hidden(network, reward, batch, activations)
        return last_token_values(network, reward, hidden, batch.mask) + params.frozen.reward_bias

    def sampling_weights(self, params: Params) -> tuple[Decoder, ModelParams]:
        """(model, parameters) of the actor in the form that the sampler runs; see `sampling/weights.py`."""
        model, weights = reshard(self.actor.model, params.actor, self.actor.axes())
        if decodes_unrolled(model.config):
            return model.clone(scan_layers=False), self.actor.unstack(weights)
        return model, self.actor.join(weights)

    def check_prompts(self, tokens: Int[np.ndarray, "B P"], mask: Bool[np.ndarray, "B P"], max_new_tokens: int) -> None:
        """Checks that all four models can run over these prompts and their responses.

        Args:
          tokens: ids, on the host.
          mask: True = real token.
          max_new_tokens: R, in tokens.

        Raises:
          ValueError: an id is outside the models' common vocabulary, or a row is longer than a learned position table;
            the message names the prompt.
        """
        lengths, vocab_size = mask.sum(axis=1), self.actor.model.config.vocab_size
        outside = mask & ((tokens < 0) | (tokens >= vocab_size))
        if outside.any():
            row, column = np.argwhere(outside)[0]
            raise ValueError(
                f"prompt {row} has the token id {tokens[row, column]}; the models' common vocabulary has {vocab_size} "
                "ids."
            )
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
        # The hidden state one slot before a token predicts it.
        hidden = _hidden(network, params, batch, activations)[:, batch.start - 1 : -1]  # [B, R, E]
        targets, head = batch.tokens[:, batch.start :], network.head_params(params)
        return score_hidden(network.model, head, hidden, targets, temperature=temperature, chunk=self.logprob_chunk)


def _hidden(
    network: SplitModel, params: SplitParams, batch: Batch, activations: Float[Array, "B T D"] | None
) -> Float[Array, "B T E"]:
    """The head's input; runs the frozen layers first if their output is not given."""
    if activations is None:
        activations = network.frozen_activations(params, batch.tokens, batch.mask)
    return network.hidden_states(params, batch.tokens, batch.mask, activations)


def _same_forward(network: SplitModel, other: SplitModel) -> bool:
    """Whether two models that share frozen layers also have the same dtype and attention implementation."""
    config = other.model.config
    return network.model.config.replace(remat=config.remat) == config
