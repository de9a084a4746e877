"""The four models of PPO, and what is asked of them: log-probs, values, scores.

Names of sizes: B rows, P prompt slots, R response slots, D width.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from jax_rlhf.models.decoder import Params
from jax_rlhf.models.split import SplitModel, SplitParams
from jax_rlhf.rollout import check_positions, score_hidden


@dataclasses.dataclass(frozen=True)
class Networks:
    """The models, without their parameters: hashable, a static argument of jitted functions.

    Attributes:
      actor, reference: with LM heads.
      critic: with a scalar head.
      reward: with a scalar head; None where only functions over texts score.
      reference_shares: the reference's frozen bottom is the actor's.
      critic_shares: the critic's is the actor's.
      reward_shares: the reward model's frozen bottom is the critic's.
      offloaded: of "reference" and "reward", those whose parameters wait in host memory (not what they share).
    """

    actor: SplitModel
    reference: SplitModel
    critic: SplitModel
    reward: SplitModel | None
    reference_shares: bool
    critic_shares: bool
    reward_shares: bool
    offloaded: tuple[str, ...] = ()

    def fetched(self, frozen: "Frozen") -> "Frozen":
        """The frozen parameters on the devices, from where they wait, under jit; before any loop that reads them."""
        on_device = {role: jax.device_put(getattr(frozen, role), jax.memory.Space.Device) for role in self.offloaded}
        return frozen.replace(**on_device)

    def check_prompts(self, tokens: np.ndarray, mask: np.ndarray, max_new_tokens: int) -> None:
        """Raises where one of the four models cannot run over these prompts and their responses.

        Args:
          tokens: int[B, P], on the host.
          mask: bool[B, P].
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


@struct.dataclass
class Trained:
    """What an update changes, of the models.

    Attributes:
      actor: the actor's trainable parameters.
      critic: the critic's.
      actor_ema: the actor's moving average, float32; None where none is kept.
    """

    actor: Params
    critic: Params
    actor_ema: Params | None


@struct.dataclass
class Frozen:
    """What no update changes.

    Attributes:
      actor, critic: the frozen bottom layers of the trained models; empty dicts where everything trains.
      reference: the reference; its `frozen` is empty where it is the actor's.
      reward: the reward model; its `frozen` is empty where it is the critic's. None where there is none.
      reward_bias, critic_bias: float32[], score or value = head + bias: a reward model's gain is folded into its head,
        its bias is not. A critic that starts as a reward model starts with its scores of unfinished texts.
      missing_eos_bias: float32[], subtracted from scores of responses without EOS.
    """

    actor: Params
    critic: Params
    reference: SplitParams
    reward: SplitParams | None
    reward_bias: Array
    critic_bias: Array
    missing_eos_bias: Array


@struct.dataclass
class Boundaries:
    """Outputs of frozen bottom layers, float[B, T, D] each; None where everything trains."""

    actor: Array | None
    critic: Array | None


def boundaries(networks: Networks, frozen: Frozen, tokens: Array, mask: Array) -> Boundaries:
    """Runs the frozen bottoms of actor and critic, once for all that is asked later.

    Args:
      networks: the models.
      frozen: their parameters.
      tokens: int[B, T].
      mask: bool[B, T].

    Returns:
      The outputs.
    """
    actor = networks.actor.boundary(SplitParams(frozen.actor, {}), tokens, mask)
    if networks.critic_shares and _same_forward(networks.critic, networks.actor):
        return Boundaries(actor, actor)
    return Boundaries(actor, networks.critic.boundary(SplitParams(frozen.critic, {}), tokens, mask))


def _same_forward(network: SplitModel, other: SplitModel) -> bool:
    """Whether two models of the same frozen bottom make the same of it: in one dtype, by one form of attention."""
    config = other.model.config
    return network.model.config.replace(remat=config.remat) == config


def _hidden_states(
    network: SplitModel, params: SplitParams, tokens: Array, mask: Array, boundary: Array | None
) -> Array:
    boundary = network.boundary(params, tokens, mask) if boundary is None else boundary
    return network.hidden_states(params, tokens, mask, boundary)


def policy_logprobs(
    network: SplitModel,
    params: SplitParams,
    tokens: Array,
    mask: Array,
    boundary: Array | None,
    *,
    start: int,
    temperature: float,
    chunk: int | None,
) -> tuple[Array, Array]:
    """Log-probs of the tokens from slot `start` on, and the entropy of the distributions that they are from.

    Args:
      network: actor or reference.
      params: its parameters.
      tokens: int[B, T].
      mask: bool[B, T].
      boundary: output of its frozen bottom; None = it runs here.
      start: P, the first slot of the response; 1 or more.
      temperature: τ, as sampled.
      chunk: positions at once; None chooses.

    Returns:
      (logprobs, entropy), each float32[B, T − start], in nats. What stands at pads means nothing.
    """
    hidden = _hidden_states(network, params, tokens, mask, boundary)[:, start - 1 : -1]
    head = network.head_params(params)
    return score_hidden(network.model, head, hidden, tokens[:, start:], temperature=temperature, chunk=chunk)


def reference_logprobs(
    networks: Networks,
    frozen: Frozen,
    tokens: Array,
    mask: Array,
    actor_boundary: Array | None,
    *,
    start: int,
    temperature: float,
    chunk: int | None,
) -> Array:
    """The reference's log-probs of the tokens from slot `start` on.

    Args:
      networks: the models.
      frozen: their parameters, `Networks.fetched`.
      tokens: int[B, T].
      mask: bool[B, T].
      actor_boundary: output of the actor's frozen bottom, used where the reference's is the same.
      start, temperature, chunk: as in `policy_logprobs`.

    Returns:
      float32[B, T − start], in nats.
    """
    network, params, boundary = networks.reference, frozen.reference, None
    if networks.reference_shares:
        params = SplitParams(frozen.actor, params.trainable)
        boundary = actor_boundary if _same_forward(network, networks.actor) else None
    how = {"start": start, "temperature": temperature, "chunk": chunk}
    return policy_logprobs(network, params, tokens, mask, boundary, **how)[0]


def critic_values(
    network: SplitModel,
    params: SplitParams,
    tokens: Array,
    mask: Array,
    boundary: Array | None,
    *,
    start: int,
    bias: Array,
) -> Array:
    """Values of the states before each response token, and of the state after the last slot.

    Args:
      network: the critic.
      params: its parameters.
      tokens: int[B, T].
      mask: bool[B, T].
      boundary: output of its frozen bottom; None = it runs here.
      start: P.
      bias: float32[], added to the head's values.

    Returns:
      float32[B, R + 1], R = T − start, in reward units.
    """
    hidden = _hidden_states(network, params, tokens, mask, boundary)[:, start - 1 :]
    return network.model.apply({"params": network.head_params(params)}, hidden, method="apply_head") + bias


def reward_scores(
    networks: Networks, frozen: Frozen, tokens: Array, mask: Array, critic_boundary: Array | None
) -> Array:
    """The reward model's score of each text, read at its last real token.

    Args:
      networks: with a reward model.
      frozen: its parameters, `Networks.fetched`.
      tokens: int[B, T], the very ids that were sampled.
      mask: bool[B, T].
      critic_boundary: of the critic's frozen bottom, used where the reward model's is the same.

    Returns:
      float32[B], bias added.
    """
    network, params, boundary = networks.reward, frozen.reward, None
    if networks.reward_shares:
        params = SplitParams(frozen.critic, params.trainable)
        boundary = critic_boundary if _same_forward(network, networks.critic) else None
    return text_scores(network, params, tokens, mask, boundary) + frozen.reward_bias


def text_scores(network: SplitModel, params: SplitParams, tokens: Array, mask: Array, boundary: Array | None) -> Array:
    """What a scalar head says of each text at its last real token.

    Args:
      network: the reward model.
      params: its parameters.
      tokens: int[B, T].
      mask: bool[B, T].
      boundary: output of its frozen bottom; None = it runs here.

    Returns:
      float32[B].
    """
    hidden = _hidden_states(network, params, tokens, mask, boundary)
    last = jnp.max(jnp.where(mask, jnp.arange(mask.shape[1]), 0), axis=1)
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    return network.model.apply({"params": network.head_params(params)}, hidden, method="apply_head")
