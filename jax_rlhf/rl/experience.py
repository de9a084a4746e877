"""What an iteration passes on: prompts in, experience out, and the rewards per token between them."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import chex
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from jax_rlhf.rl.kl import KLKind, kl_estimate


@struct.dataclass
class Prompts:
    """Prompts of one iteration, padded on the left.

    Attributes:
      tokens: int32[B, P].
      mask: bool[B, P], True = real token; each row ends with one.
      row_ids: int32[B], the address of each row's randomness: no two rows of an iteration share one.
      columns: the data set's other columns, one entry per row each; they go to reward functions.
      chats: the messages of each prompt, None where it is a plain text; None = all are. They go to reward functions.
      continued: bool each, the chat ends within a turn of the assistant, which the response goes on with; None = none.
    """

    tokens: Array
    mask: Array
    row_ids: Array
    columns: Mapping[str, Sequence[Any]] = struct.field(pytree_node=False, default_factory=dict)
    chats: Sequence[Any] | None = struct.field(pytree_node=False, default=None)
    continued: Sequence[bool] | None = struct.field(pytree_node=False, default=None)


@struct.dataclass
class Experience:
    """What `generate_experience` made of B prompts, and `train_rlhf` learns from.

    Attributes:
      tokens: int32[B, P + R], prompts padded on the left, then responses padded on the right.
      prompt_mask: bool[B, P].
      response_mask: bool[B, R], True through EOS.
      logprobs: float32[B, R], the scorer's log-probs of the actor when it sampled: the old ones, in nats.
      sampler_logprobs: float32[B, R], the sampler's log-probs of the same.
      ref_logprobs: float32[B, R], the reference's.
      values: float32[B, R], the critic's value of the state before each token, in reward units.
      rewards: float32[B, R], score and KL penalty per token.
      advantages: float32[B, R], whitened where the config says so.
      returns: float32[B, R], advantages + values, before whitening.
      scores: float32[B], what the reward source gave, before clipping and penalties.
      ended: bool[B], the response has its EOS.
      kept_mass: float32[B, R], probability that the sampler's filters (top-k, top-p, min-new-tokens) left.
      actor_boundary, critic_boundary: float[B, P + R, D], outputs of the frozen bottom layers; None where all train.

    All per-token arrays are 0 where the response mask is False.
    """

    tokens: Array
    prompt_mask: Array
    response_mask: Array
    logprobs: Array
    sampler_logprobs: Array
    ref_logprobs: Array
    values: Array
    rewards: Array
    advantages: Array
    returns: Array
    scores: Array
    ended: Array
    kept_mass: Array
    actor_boundary: Array | None = None
    critic_boundary: Array | None = None


def token_rewards(
    scores: Array,
    logprobs: Array,
    ref_logprobs: Array,
    mask: Array,
    *,
    kl_coef: Array | float,
    kl_kind: KLKind = "k1",
    kl_reduction: Literal["sum", "mean"] = "sum",
) -> Array:
    """The score at the last real token, less the KL penalty at every one.

    r_t = −β kl_t + [t is the last real token] · score

    Args:
      scores: float[B], in reward units.
      logprobs, ref_logprobs: float[B, R], in nats.
      mask: bool[B, R], True through EOS.
      kl_coef: β, reward units per nat.
      kl_kind: the estimate of kl_t.
      kl_reduction: "sum": Σ_t r_t = score − β Σ kl_t, under which a short response pays less; "mean": each row's kl_t
        is divided by its length, so that length is neutral.

    Returns:
      float[B, R], 0 where the mask is False. A row without a real token has no reward.

    Source: Ziegler et al. 2019, eq. 2; Stiennon et al. 2020, section 3.4.
    """
    chex.assert_type([scores, logprobs, ref_logprobs, mask], [float, float, float, bool])
    chex.assert_rank([scores, logprobs, ref_logprobs, mask], [1, 2, 2, 2])
    chex.assert_equal_shape([logprobs, ref_logprobs, mask])
    kl = jnp.where(mask, kl_estimate(logprobs, ref_logprobs, kl_kind), 0)
    if kl_reduction == "mean":
        kl = kl / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
    elif kl_reduction != "sum":
        raise ValueError(f'kl_reduction={kl_reduction!r}; "sum" and "mean" are the forms there are.')
    return -kl_coef * kl + jnp.where(last_real(mask), scores[:, None], 0)


def shaped_scores(scores: Array, ended: Array, *, clip: float | None = None, missing_eos_penalty: float = 0.0) -> Array:
    """What is optimised of the scores: clipped to ± clip, less the penalty where a response has no EOS.

    Args:
      scores: float[B], in reward units.
      ended: bool[B], the response has its EOS.
      clip: in reward units; None = none.
      missing_eos_penalty: in reward units.

    Returns:
      float[B].
    """
    chex.assert_type([scores, ended], [float, bool])
    chex.assert_rank([scores, ended], 1)
    if clip is not None:
        scores = jnp.clip(scores, -clip, clip)
    return scores - missing_eos_penalty * ~ended


def last_real(mask: Array) -> Array:
    """Marks the last True of each row.

    Args:
      mask: bool[B, R].

    Returns:
      bool[B, R], one True a row, none in a row of False.
    """
    slot = jnp.arange(mask.shape[1])
    return mask & (slot == jnp.max(jnp.where(mask, slot, -1), axis=1, keepdims=True))


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
