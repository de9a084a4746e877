"""Log-probs of given tokens, and entropy, without [B, T, V] float32 logits in memory, forward or backward.

The head runs over one chunk of positions at a time. The backward pass recomputes the logits of a chunk.
"""

import functools

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float, Float32, Int, Shaped

from jax_rlhf.models import Decoder, DecoderConfig, model_jit
from jax_rlhf.models.decoder import Params
from jax_rlhf.rl.types import AnyArray

_SAVED = "log_normalizer_and_entropy"


def token_logprobs(
    model: Decoder,
    params: Params,
    tokens: Int[AnyArray, "B T"],
    mask: Bool[AnyArray, "B T"],
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Float32[Array, "B T-1"]:
    """log π(token | previous tokens) of each token, from log softmax(logits / τ).

    Args:
      model: with an LM head.
      params: its parameters.
      tokens: ids.
      mask: True = real token.
      temperature: τ, as in sampling.
      chunk: positions whose logits are in memory at once; None chooses by vocabulary size and backend.

    Returns:
      Log-probs of tokens[:, 1:], in nats; 0 for pads and for a row's first real token.
    """
    return _token_logprobs(model, params, jnp.asarray(tokens), jnp.asarray(mask), temperature, chunk)


@functools.partial(model_jit, static_argnums=(0, 4, 5))
def _token_logprobs(
    model: Decoder,
    params: Params,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    temperature: float,
    chunk: int | None,
) -> Float32[Array, "B T-1"]:
    hidden = model.apply({"params": params}, tokens, mask=mask, method="hidden_states")  # [B, T, E]
    # A token is predicted at the last real token before it, which is further back if pads are in between. The first
    # real token has no predecessor.
    before = jnp.cumsum(mask, axis=1)[:, :-1] > 0  # [B, T − 1]
    slot = jax.lax.cummax(jnp.where(mask, jnp.arange(mask.shape[1]), 0), axis=1)[:, :-1]  # [B, T − 1]
    hidden = jnp.take_along_axis(hidden, slot[..., None], axis=1)  # [B, T − 1, E]
    logprobs, _ = score_hidden(model, params, hidden, tokens[:, 1:], temperature=temperature, chunk=chunk)
    return jnp.where(mask[:, 1:] & before, logprobs, 0)


def score_hidden(
    model: Decoder,
    params: Params,
    hidden: Float[Array, "B T E"],
    targets: Int[AnyArray, "B T"],
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> tuple[Float32[Array, "B T"], Float32[Array, "B T"]]:
    """Log-probs of target tokens, and the entropy of the predicted distributions.

    Args:
      model: with an LM head.
      params: its parameters; only those of the head are read.
      hidden: the head's input.
      targets: the token that follows each position; an id outside the vocabulary (at a pad) is replaced by 0.
      temperature: τ.
      chunk: positions whose logits are in memory at once; None chooses.

    Returns:
      (logprobs, entropy), in nats, differentiable with respect to params and hidden.
    """
    chex.assert_rank([hidden, targets], [3, 2])
    chex.assert_type([hidden, targets], [float, int])
    (batch, length), vocab = targets.shape, model.config.vocab_size
    targets = jnp.where((targets >= 0) & (targets < vocab), targets, 0)  # [B, T]
    positions = min(length, default_chunk(batch, model.config) if chunk is None else chunk)

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(_SAVED))
    def score(
        hidden: Float[Array, "B chunk E"], targets: Int[Array, "B chunk"]
    ) -> tuple[Float32[Array, "B chunk"], Float32[Array, "B chunk"]]:
        logits = model.apply({"params": params}, hidden, method="apply_head")  # [B, chunk, V]
        return categorical(logits / temperature, targets)

    if positions == length:
        return score(hidden, targets)
    count = -(-length // positions)

    def split(x: Shaped[Array, "B T ..."]) -> Shaped[Array, "count B chunk ..."]:
        x = jnp.pad(x, ((0, 0), (0, count * positions - length)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, count, positions, *x.shape[2:]), 1, 0)

    _, scored = jax.lax.scan(lambda carry, xs: (carry, score(*xs)), None, (split(hidden), split(targets)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, -1)[:, :length], scored)


def default_chunk(batch: int, config: DecoderConfig) -> int:
    """Positions whose logits are in memory at once: 32 MiB per device on CPU (near its caches), 512 MiB elsewhere.

    Args:
      batch: B, rows of all devices.
      config: the model's.
    """
    budget = 2**23 if config.platform == "cpu" else 2**27
    if config.layout is not None:
        budget *= config.layout.num_shards("rows") * config.layout.num_shards("vocab")
    return max(1, budget // (batch * config.table_rows))  # the product covers all rows of the table, padding included


@jax.custom_vjp
def categorical(
    logits: Float32[Array, "*batch V"], targets: Int[Array, "*batch"]
) -> tuple[Float32[Array, "*batch"], Float32[Array, "*batch"]]:
    """(log-probs of the targets, entropy) of softmax(logits), in nats.

    log p_y = z_y − log Σ exp z;   H = log Σ exp z − Σ p z
    """
    return _categorical_forward(logits, targets)[0]


def _categorical_forward(
    logits: Float32[Array, "*batch V"], targets: Int[Array, "*batch"]
) -> tuple[tuple[Float32[Array, "*batch"], Float32[Array, "*batch"]], tuple[Array, ...]]:
    chex.assert_type(logits, jnp.float32)
    peak = jnp.max(logits, axis=-1, keepdims=True)  # [..., 1]
    weights = jnp.exp(logits - peak)  # [..., V]
    total = jnp.sum(weights, axis=-1)  # [...]
    log_normalizer = peak[..., 0] + jnp.log(total)  # [...]
    entropy = log_normalizer - jnp.sum(weights * logits, axis=-1) / total  # [...]
    # Saved by name for the backward pass, which then recomputes one matrix product and one exp, and no reduction.
    log_normalizer, entropy = checkpoint_name(log_normalizer, _SAVED), checkpoint_name(entropy, _SAVED)
    logprobs = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - log_normalizer
    return (logprobs, entropy), (logits, targets, log_normalizer, entropy)


def _categorical_backward(
    residuals: tuple[Array, ...], gradients: tuple[Float32[Array, "*batch"], Float32[Array, "*batch"]]
) -> tuple[Float32[Array, "*batch V"], None]:
    logits, targets, log_normalizer, entropy = residuals
    logprob_gradient, entropy_gradient = (g[..., None] for g in gradients)  # [..., 1]
    logp = logits - log_normalizer[..., None]  # [..., V]
    chosen = jnp.arange(logits.shape[-1]) == targets[..., None]  # [..., V]
    probabilities = jnp.exp(logp)
    # ∂ log p_y / ∂z = 1[y] − p;  ∂H / ∂z = −p (log p + H)
    gradient = logprob_gradient * (chosen - probabilities)
    return gradient - entropy_gradient * probabilities * (logp + entropy[..., None]), None


categorical.defvjp(_categorical_forward, _categorical_backward)
