"""What an iteration of PPO passes on: prompts, rows that the models run over, experience."""

from collections.abc import Mapping, Sequence
from typing import Any

import chex
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jaxtyping import Bool, Float, Int

AnyArray = Array | np.ndarray
"""An array on the devices, or in NumPy on the host."""
Scalar = Float[Array, ""] | float
"""A number that may be traced."""


class Prompts(struct.PyTreeNode):
    """Prompts of one iteration, padded on the left.

    Attributes:
      tokens: ids.
      mask: True = real token; each row ends with one.
      row_ids: the address of each row's randomness: no two rows of an iteration share one.
      columns: the data set's other columns, one entry per row each; they go to reward functions. None under `jit`.
      chats: the messages of each prompt, None where it is a plain text; None = all are. They go to reward functions.
      continued: bool each, the chat ends within a turn of the assistant, which the response goes on with; None = none.
    """

    tokens: Int[AnyArray, "B P"]
    mask: Bool[AnyArray, "B P"]
    row_ids: Int[AnyArray, "B"]
    columns: Mapping[str, Sequence[Any]] | None = struct.field(pytree_node=False, default_factory=dict)
    chats: Sequence[Any] | None = struct.field(pytree_node=False, default=None)
    continued: Sequence[bool] | None = struct.field(pytree_node=False, default=None)


class FrozenActivations(struct.PyTreeNode):
    """Outputs of the frozen bottom layers, computed once per rollout.

    Attributes:
      actor, critic: None where everything trains, and where they are not cached.
    """

    actor: Float[Array, "B T D"] | None = None
    critic: Float[Array, "B T D"] | None = None


class Batch(struct.PyTreeNode):
    """Rows that the models run over.

    Attributes:
      tokens: ids.
      mask: True = real token.
      frozen_activations: of the same rows.
      start: the first slot whose tokens are scored, 1 or more: P, where these are prompts and responses.
    """

    tokens: Int[AnyArray, "B T"]
    mask: Bool[AnyArray, "B T"]
    frozen_activations: FrozenActivations = FrozenActivations()
    start: int = struct.field(pytree_node=False, default=1)


class Experience(struct.PyTreeNode):
    """What `generate_experience` made of B prompts, and `train_rlhf` learns from.

    Attributes:
      tokens: prompts padded on the left, then responses padded on the right: T = P + R.
      prompt_mask: True = real token.
      response_mask: True through EOS.
      logprobs: the scorer's log-probs of the actor when it sampled: the old ones, in nats.
      sampler_logprobs: the sampler's log-probs of the same.
      ref_logprobs: the reference's.
      values: the critic's value of the state before each token, in reward units.
      rewards: score and KL penalty per token.
      advantages: whitened where the config says so.
      returns: advantages + values, before whitening.
      scores: what the reward source gave, before clipping and penalties.
      ended: the response has its EOS.
      kept_mass: probability that the sampler's filters (top-k, top-p, min-new-tokens) left.
      frozen_activations: outputs of the frozen bottom layers, of all T slots.

    All per-token arrays are 0 where the response mask is False.
    """

    tokens: Int[Array, "B T"]
    prompt_mask: Bool[Array, "B P"]
    response_mask: Bool[Array, "B R"]
    logprobs: Float[Array, "B R"]
    sampler_logprobs: Float[Array, "B R"]
    ref_logprobs: Float[Array, "B R"]
    values: Float[Array, "B R"]
    rewards: Float[Array, "B R"]
    advantages: Float[Array, "B R"]
    returns: Float[Array, "B R"]
    scores: Float[Array, "B"]
    ended: Bool[Array, "B"]
    kept_mass: Float[Array, "B R"]
    frozen_activations: FrozenActivations = FrozenActivations()

    @property
    def batch(self) -> Batch:
        """The rows as the models run over them: prompts with their responses."""
        mask = jnp.concatenate([self.prompt_mask, self.response_mask], axis=1)  # [B, P + R]
        return Batch(self.tokens, mask, self.frozen_activations, start=self.prompt_mask.shape[1])


def check_experience(experience: Experience) -> None:
    """Stops where an experience is not what it should be; for debugging, on the host.

    Args:
      experience: a process's rows, in NumPy arrays.

    Raises:
      AssertionError: something is not finite, a log-prob is above 0, a mask has a hole, or a pad has a number.
    """
    rows, width = experience.prompt_mask.shape
    responses = experience.tokens.shape[1] - width
    per_token = {
        name: getattr(experience, name)
        for name in ("logprobs", "sampler_logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns")
    }
    chex.assert_shape(list(per_token.values()), (rows, responses))
    chex.assert_tree_all_finite((per_token, experience.scores))
    mask, prompt_mask = experience.response_mask, experience.prompt_mask
    holes = {"prompt_mask": np.any(prompt_mask[:, :-1] & ~prompt_mask[:, 1:])}
    holes["response_mask"] = np.any(~mask[:, :-1] & mask[:, 1:])
    for name, hole in holes.items():
        if hole:
            raise AssertionError(f"{name} has a hole: real tokens must be next to each other.")
    for name, array in per_token.items():
        if np.any(array[~mask] != 0):
            raise AssertionError(f"{name} is not 0 where the response mask is False.")
        if name.endswith("logprobs") and np.any(array > 1e-5):
            raise AssertionError(f"{name} is above 0: {array.max()}.")
