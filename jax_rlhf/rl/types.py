"""The data of a PPO iteration: prompts, batches for the models, experience."""

from collections.abc import Mapping, Sequence
from typing import Any

import chex
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jaxtyping import Bool, Float, Int

AnyArray = Array | np.ndarray
"""A JAX array on the devices, or a NumPy array on the host."""
Scalar = Float[Array, ""] | float
"""A float, or a scalar array that may be traced."""


class Prompts(struct.PyTreeNode):
    """Prompts of one iteration, padded on the left.

    Attributes:
      tokens: ids.
      mask: True = real token; the last slot of each row is real.
      row_ids: folded into the sampling key of each row; unique within an iteration.
      columns: other columns of the data set, one entry per row, passed to reward functions. None under `jit`.
      chats: the messages of each prompt, passed to reward functions. An entry is None for a plain text; None = all
        prompts are plain texts.
      continued: True = the chat ends inside an assistant turn, which the response continues; None = no chat does.
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
      actor, critic: None if the model has no frozen layers, or if they are not cached.
    """

    actor: Float[Array, "B T D"] | None = None
    critic: Float[Array, "B T D"] | None = None


class Batch(struct.PyTreeNode):
    """A batch for the models.

    Attributes:
      tokens: ids.
      mask: True = real token.
      frozen_activations: of the same rows.
      start: the first slot whose tokens are scored, 1 or more; P for prompts with responses.
    """

    tokens: Int[AnyArray, "B T"]
    mask: Bool[AnyArray, "B T"]
    frozen_activations: FrozenActivations = FrozenActivations()
    start: int = struct.field(pytree_node=False, default=1)


class Experience(struct.PyTreeNode):
    """The result of `generate_experience` for B prompts, and the input of `train_rlhf`.

    All per-token arrays of floats are 0 where the response mask is False.

    Attributes:
      tokens: prompts padded on the left, then responses padded on the right: T = P + R.
      prompt_mask: True = real token.
      response_mask: True through EOS.
      logprobs: the old log-probs, recomputed by the scorer with the actor's weights at sampling time, in nats.
      sampler_logprobs: the sampler's log-probs of the same tokens, in nats.
      ref_logprobs: the reference's log-probs of the same tokens, in nats.
      values: the critic's value of the state before each token, in reward units.
      rewards: score minus KL penalty, per token.
      advantages: whitened if config.whiten_advantages is set.
      returns: unwhitened advantages + values.
      scores: from the reward model and reward functions, before clipping and penalties.
      ended: True = the response ends with EOS.
      kept_mass: probability mass that the sampling filters (top-k, top-p, min-new-tokens) leave.
      frozen_activations: outputs of the frozen bottom layers at all T slots.
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
        """Prompts with their responses as a batch for the models."""
        mask = jnp.concatenate([self.prompt_mask, self.response_mask], axis=1)  # [B, P + R]
        return Batch(self.tokens, mask, self.frozen_activations, start=self.prompt_mask.shape[1])


def check_experience(experience: Experience) -> None:
    """Checks the invariants of an experience, for debugging on the host.

    Args:
      experience: a process's rows, in NumPy arrays.

    Raises:
      AssertionError: a number is not finite, a log-prob is above 0, a mask has a gap between real tokens, or a value at
        a pad is not 0.
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
    gaps = {"prompt_mask": np.any(prompt_mask[:, :-1] & ~prompt_mask[:, 1:])}
    gaps["response_mask"] = np.any(~mask[:, :-1] & mask[:, 1:])
    for name, gap in gaps.items():
        if gap:
            raise AssertionError(f"{name} has a gap: real tokens must be contiguous.")
    for name, array in per_token.items():
        if np.any(array[~mask] != 0):
            raise AssertionError(f"{name} is not 0 where the response mask is False.")
        if name.endswith("logprobs") and np.any(array > 1e-5):
            raise AssertionError(f"{name} is above 0: {array.max()}.")
