"""What one microbatch adds to the actor's and the critic's losses, and to what is measured of them."""

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from jax_rlhf.models.decoder import Params
from jax_rlhf.models.split import SplitParams
from jax_rlhf.rl import (
    Experience,
    clipped_surrogate,
    clipped_value_loss,
    kl_estimate,
    masked_mean,
    masked_sum,
    penalized_surrogate,
)
from jax_rlhf.training.config import PPOConfig
from jax_rlhf.training.networks import Frozen, Networks, critic_values, policy_logprobs


@struct.dataclass
class PretrainingRows:
    """Text for the pretraining loss of PPO-ptx.

    Attributes:
      tokens: int32[N, T]; N a multiple of minibatches × microbatches.
      mask: bool[N, T], True = real token.
      boundary: float[N, T, D], output of the actor's frozen bottom; filled in by the update.
    """

    tokens: Array
    mask: Array
    boundary: Array | None = None


@struct.dataclass
class Sums:
    """What a microbatch adds up over tokens, divided by the minibatch's token count: float32[] each.

    Attributes:
      policy_loss, value_loss, ptx_loss: the losses, without entropy bonus and coefficients.
      entropy: in nats.
      approx_kl: ½ (log ρ)², in nats.
      penalty_kl: k3(old ‖ new), in nats.
      clipped: tokens on which PPO-clip holds the actor.
      value_clipped: tokens on which the clipped value loss is the larger one.
      ratio: ρ.
      ratio_gap: the largest |ρ − 1|: not a sum.
    """

    policy_loss: Array
    value_loss: Array
    ptx_loss: Array
    entropy: Array
    approx_kl: Array
    penalty_kl: Array
    clipped: Array
    value_clipped: Array
    ratio: Array
    ratio_gap: Array


@struct.dataclass
class LossWeights:
    """What the actor's losses are multiplied with and divided by, the same for all microbatches of a minibatch.

    Attributes:
      penalty: float32[], β of PPO-penalty.
      entropy: float32[], the bonus's coefficient, per nat.
      tokens: float32[], counted tokens of the minibatch's responses.
      text_tokens: int32[], counted tokens of its texts; 1 without texts.
    """

    penalty: Array
    entropy: Array | float
    tokens: Array
    text_tokens: Array | int


def actor_loss(
    networks: Networks,
    config: PPOConfig,
    actor: Params,
    frozen: Params,
    batch: Experience,
    text: PretrainingRows | None,
    weights: LossWeights,
) -> tuple[Array, Sums]:
    """The actor's loss on a microbatch.

    Args:
      networks, config: the models and the settings.
      actor, frozen: the actor's trainable and frozen parameters.
      batch: rows of the experience.
      text: rows for the pretraining loss, or None.
      weights: of the whole minibatch.

    Returns:
      (loss, sums): float32[], and what is measured; `value_loss` and `value_clipped` are 0.
    """
    params, mask, count = SplitParams(frozen, actor), batch.response_mask, weights.tokens
    logprobs, entropy = _new_logprobs(networks, config, params, batch)
    log_ratio = jnp.where(mask, logprobs - batch.logprobs, 0)
    old_to_new = kl_estimate(jnp.zeros_like(log_ratio), log_ratio, "k3")
    if config.policy_loss == "penalty":
        per_token = penalized_surrogate(log_ratio, batch.advantages, old_to_new, beta=weights.penalty)
        low, high = jnp.inf, jnp.inf  # nothing is clipped
    else:
        low, high = config.clip_range, config.clip_range
        high = high if config.clip_range_high is None else config.clip_range_high
        per_token = clipped_surrogate(
            log_ratio, batch.advantages, clip_low=low, clip_high=high, dual_clip=config.dual_clip
        )
    policy_loss = masked_sum(per_token, mask) / count
    mean_entropy = masked_sum(entropy, mask) / count
    loss = policy_loss - weights.entropy * mean_entropy if config.entropy_coef else policy_loss
    ptx_loss = jnp.float32(0)
    if text is not None:
        ptx_loss = _pretraining_loss(networks, config, params, text) / weights.text_tokens
        loss = loss + config.ptx_coef * ptx_loss
    ratio, advantages = jnp.exp(log_ratio), batch.advantages
    clipped = ((advantages < 0) & (ratio < 1 - low)) | ((advantages > 0) & (ratio > 1 + high))
    mean = lambda x: masked_sum(x.astype(jnp.float32), mask) / count  # noqa: E731
    return loss, Sums(
        policy_loss=policy_loss,
        value_loss=jnp.float32(0),
        ptx_loss=ptx_loss,
        entropy=mean_entropy,
        approx_kl=mean(0.5 * jnp.square(log_ratio)),
        penalty_kl=mean(old_to_new),
        clipped=mean(clipped),
        value_clipped=jnp.float32(0),
        ratio=mean(ratio),
        ratio_gap=jnp.max(jnp.abs(ratio - 1), initial=0, where=mask),
    )


def _new_logprobs(networks: Networks, config: PPOConfig, params: SplitParams, batch: Experience) -> tuple[Array, Array]:
    mask = jnp.concatenate([batch.prompt_mask, batch.response_mask], axis=1)
    return policy_logprobs(
        networks.actor,
        params,
        batch.tokens,
        mask,
        batch.actor_boundary,
        start=batch.prompt_mask.shape[1],
        temperature=config.temperature,
        chunk=config.logprob_chunk,
    )


def predicted(mask: Array) -> Array:
    """Which tokens the pretraining loss counts: real ones that follow a real one.

    Args:
      mask: bool[..., T].

    Returns:
      bool[..., T − 1], of the tokens from the second on.
    """
    return mask[..., 1:] & mask[..., :-1]


def _pretraining_loss(networks: Networks, config: PPOConfig, params: SplitParams, text: PretrainingRows) -> Array:
    """Σ −log π(token) at temperature 1 over the rows: InstructGPT's PPO-ptx (Ouyang et al. 2022, eq. 2)."""
    logprobs, _ = policy_logprobs(
        networks.actor,
        params,
        text.tokens,
        text.mask,
        text.boundary,
        start=1,
        temperature=1.0,
        chunk=config.logprob_chunk,
    )
    return -masked_sum(logprobs, predicted(text.mask))


def critic_loss(
    networks: Networks, config: PPOConfig, critic: Params, frozen: Frozen, batch: Experience, count: Array
) -> tuple[Array, dict[str, Array]]:
    """The critic's loss on a microbatch.

    Args:
      networks, config: the models and the settings.
      critic: its trainable parameters.
      frozen: what no update changes.
      batch: rows of the experience.
      count: float32[], tokens of the whole minibatch.

    Returns:
      (loss, {"value_loss", "value_clipped"}): float32[] each.
    """
    mask, full_mask = batch.response_mask, jnp.concatenate([batch.prompt_mask, batch.response_mask], axis=1)
    start = batch.prompt_mask.shape[1]
    values = critic_values(
        networks.critic,
        SplitParams(frozen.critic, critic),
        batch.tokens,
        full_mask,
        batch.critic_boundary,
        start=start,
        bias=frozen.critic_bias,
    )[:, :-1]
    per_token = clipped_value_loss(values, batch.values, batch.returns, clip_range=config.value_clip_range)
    loss = masked_sum(per_token, mask) / count
    clipped = per_token > 0.5 * jnp.square(values - batch.returns)
    return loss, {"value_loss": loss, "value_clipped": masked_sum(clipped.astype(jnp.float32), mask) / count}


def penalty_kl(
    networks: Networks, config: PPOConfig, actor: Params, frozen: Params, experience: Experience, rows: Array
) -> Array:
    """Token mean of k3(old ‖ new), for the controller of PPO-penalty's β.

    Args:
      networks, config: the models and the settings.
      actor, frozen: the actor's trainable and frozen parameters.
      experience: all rows.
      rows: int[microbatches, rows each], those to measure.

    Returns:
      float32[], in nats per token.
    """

    def of(rows: Array) -> tuple[Array, Array]:
        batch = jax.tree.map(lambda leaf: leaf[rows], experience)
        logprobs, _ = _new_logprobs(networks, config, SplitParams(frozen, actor), batch)
        return jnp.where(batch.response_mask, kl_estimate(batch.logprobs, logprobs, "k3"), 0), batch.response_mask

    return masked_mean(*jax.lax.map(of, rows))
