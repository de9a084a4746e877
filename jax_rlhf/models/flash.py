"""Attention without T × T scores in memory: cuDNN's flash attention on GPU, JAX's splash attention kernel on TPU.

It is used for whole rows: scoring, training, prefill into an empty cache. Both kernels mask by position in the row,
`attention.py` by the order of real tokens. The two differ if pads are between real tokens. For the splash kernel
without a sliding window it is enough to mask pads, which become a segment of their own. With a sliding window, and for
cuDNN, which takes lengths instead of masks, real tokens are first moved to the front of their row.

`DecoderConfig.attention="flash"` selects these kernels. On CPU, and for rows of fewer than `MIN_LENGTH` tokens, it
falls back to plain XLA attention.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
    splash_attention_mask as splash_mask,
)
from jaxtyping import Bool, Float, Int, Shaped

from jax_rlhf.models.config import DecoderConfig
from jax_rlhf.parallel import Layout

Queries = Float[Array, "B T H head_dim"]
Keys = Float[Array, "B K T head_dim"]  # and values
Real = Bool[Array, "B T"]
Segments = Int[Array, "B T"] | None
Kernel = Callable[[Queries, Keys, Keys, Real, Segments], Queries]

MIN_LENGTH = 128  # one block of the splash kernel; for shorter rows all scores fit in one block


def check_flash(config: DecoderConfig) -> None:
    """Checks that the platform's kernel supports a decoder with attention="flash".

    Raises:
      ValueError: the kernel does not support the decoder; the message says why, and what to set instead.
    """
    if config.attention != "flash" or config.platform == "cpu":
        return
    problems = []
    if config.platform == "gpu":
        if config.dtype not in (jnp.bfloat16, jnp.float16):
            problems.append(f"needs a 16-bit dtype, but dtype is {config.dtype}")
        if config.head_dim > 256 or config.head_dim % 8:
            problems.append(f"needs head_dim to be a multiple of 8 up to 256, but it is {config.head_dim}")
        if config.attention_softcap is not None:
            problems.append(f"has no soft cap, but attention_softcap is {config.attention_softcap}")
    if config.layout is not None and config.layout.num_shards("heads") != config.layout.num_shards("kv_heads"):
        problems.append("needs the same sharding of heads and kv_heads, but config.mesh.rules shards them differently")
    if problems:
        kernel = "cuDNN" if config.platform == "gpu" else "the splash kernel"
        raise ValueError(f'attention="flash": {kernel} {"; ".join(problems)}. Set attention="xla" for this model.')


def uses_flash(config: DecoderConfig, length: int) -> bool:
    """Whether rows of this length use a kernel (True) or plain XLA attention (False)."""
    return config.attention == "flash" and config.platform != "cpu" and length >= MIN_LENGTH


def flash_attend(
    query: Queries,
    key: Keys,
    value: Keys,
    real: Real,
    segments: Segments,
    *,
    config: DecoderConfig,
    window: int | None,
    scale: Float[Array, ""] | float,
) -> Queries:
    """Computes `attention.attend` with the mask of `attention.visible`, without the scores in memory.

    Args:
      query: of whole rows.
      key, value: of the same tokens.
      real: False = pad.
      segments: indices, from 0, of texts packed into a row; None = each row is one text.
      config: the decoder's: soft cap, platform, layout.
      window: number of tokens that a query attends to, itself included; None = all tokens up to itself.
      scale: factor on q·k.

    Returns:
      Attention outputs in query's dtype. Outputs at pads are finite and meaningless.

    Raises:
      ValueError: see `check_flash`.

    Source: Dao et al. 2022, "FlashAttention"; the kernels are NVIDIA's cuDNN and JAX's own.
    """
    check_flash(config)
    if window is not None and window >= query.shape[1]:
        window = None
    if config.platform == "gpu":
        if not isinstance(scale, float):  # cuDNN takes only a static scale
            query, scale = _scaled(query, scale), 1.0
        kernel = partial(_compact_and_attend, partial(_cudnn_attend, window=window, scale=scale))
    else:
        kernel, query = partial(_splash_attend, window=window, cap=config.attention_softcap), _scaled(query, scale)
        if window is not None:
            kernel = partial(_compact_and_attend, kernel)
    return _on_each_device(kernel, config.layout)(query, key, value, real, segments)


def _scaled(query: Queries, scale: Float[Array, ""] | float) -> Queries:
    return (query.astype(jnp.float32) * scale).astype(query.dtype)


def _on_each_device(kernel: Kernel, layout: Layout | None) -> Kernel:
    # XLA cannot partition a kernel, so each device runs it on its own rows and heads.
    if layout is None:
        return kernel

    def run(query: Queries, key: Keys, value: Keys, real: Real, segments: Segments) -> Queries:
        rows = layout.spec(("rows", None), real.shape)
        queries = layout.spec(("rows", None, "heads", None), query.shape)
        keys = layout.spec(("rows", "kv_heads", None, None), key.shape)
        specs = (queries, keys, keys, rows, rows)
        sharded = jax.shard_map(kernel, mesh=layout.mesh, in_specs=specs, out_specs=queries, check_vma=False)
        return sharded(query, key, value, real, segments)

    return run


def _compact_and_attend(
    kernel: Kernel, query: Queries, key: Keys, value: Keys, real: Real, segments: Segments
) -> Queries:
    """Runs a kernel with real tokens moved to the front of each row, and moves the outputs back."""
    # A stable sort preserves the order of real tokens, so their positions then equal their orders.
    order = jnp.argsort(~real, axis=1, stable=True)  # [B, T]
    inverse = jnp.argsort(order, axis=1)  # [B, T]
    compact = partial(_permute, order=order, inverse=inverse)
    if segments is not None:
        segments = jnp.take_along_axis(segments, order, axis=1)
    query = compact(query, axis=1)
    key, value = compact(key, axis=2), compact(value, axis=2)
    mixed = kernel(query, key, value, jnp.take_along_axis(real, order, axis=1), segments)
    return _permute(mixed, order=inverse, inverse=order, axis=1)


def _permute(
    x: Float[Array, "*shape"], *, order: Int[Array, "B T"], inverse: Int[Array, "B T"], axis: int
) -> Float[Array, "*shape"]:
    """x[b, order[b, t]]; its gradient gathers with the inverse permutation, where JAX would scatter."""

    def take(x: Float[Array, "*shape"], indices: Int[Array, "B T"]) -> Float[Array, "*shape"]:
        shape = [1] * x.ndim
        shape[0], shape[axis] = indices.shape
        return jnp.take_along_axis(x, indices.reshape(shape), axis=axis)

    @jax.custom_vjp
    def permute(
        x: Float[Array, "*shape"], order: Int[Array, "B T"], inverse: Int[Array, "B T"]
    ) -> Float[Array, "*shape"]:
        del inverse
        return take(x, order)

    permute.defvjp(
        lambda x, order, inverse: (take(x, order), inverse),
        lambda inverse, gradient: (take(gradient, inverse), None, None),
    )
    return permute(x, order, inverse)


def _pad_end(x: Shaped[Array, "..."], axis: int, by: int) -> Shaped[Array, "..."]:
    return x if by == 0 else jnp.pad(x, [(0, by if index == axis else 0) for index in range(x.ndim)])


def _cudnn_attend(
    query: Queries, key: Keys, value: Keys, real: Real, segments: Segments, *, window: int | None, scale: float
) -> Queries:
    """cuDNN's attention; real tokens must be at the front of each row."""
    length, mask = query.shape[1], None
    lengths = jnp.maximum(jnp.sum(real, axis=1, dtype=jnp.int32), 1)  # [B]; an empty row attends to its first pad
    # cuDNN does not specify results and gradients beyond the lengths, so pads are set to 0.
    query, key, value = _without_pads(query, real, 1), _without_pads(key, real, 2), _without_pads(value, real, 2)
    if segments is not None:
        # cuDNN needs an even number of columns. The mask takes one boolean per pair of tokens, the scores would take H
        # float32 numbers.
        odd = length % 2
        query, segments = _pad_end(query, 1, odd), _pad_end(segments, 1, odd)
        key, value = _pad_end(key, 2, odd), _pad_end(value, 2, odd)
        mask = segments[:, None, :, None] == segments[:, None, None, :]
    mixed = jax.nn.dot_product_attention(
        query,
        key.swapaxes(1, 2),
        value.swapaxes(1, 2),
        mask=mask,
        scale=scale,
        is_causal=True,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
    return _without_pads(mixed[:, :length], real, 1)


def _without_pads(x: Float[Array, "*shape"], real: Real, axis: int) -> Float[Array, "*shape"]:
    return jnp.where(jnp.expand_dims(real, [index for index in range(1, x.ndim) if index != axis]), x, 0)


def _splash_attend(
    query: Queries, key: Keys, value: Keys, real: Real, segments: Segments, *, window: int | None, cap: float | None
) -> Queries:
    """The splash kernel; with a window, real tokens must be at the front. Pads are a segment of their own."""
    length, heads = query.shape[1], query.shape[2]
    texts = jnp.where(real, 1 if segments is None else segments + 1, 0)
    # The largest block size that pads a row by at most an eighth.
    block = next(size for size in (512, 256, 128) if size == 128 or math.ceil(length / size) * size <= 1.125 * length)
    by = -length % block
    query, texts = _pad_end(query, 1, by), _pad_end(texts, 1, by)
    key, value = _pad_end(key, 2, by), _pad_end(value, 2, by)
    shape = (length + by, length + by)
    mask = splash_mask.CausalMask(shape) if window is None else splash_mask.LocalMask(shape, (window - 1, 0), 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks: dict[str, Any] = {f"block_{name}": block for name in names}
    kernel = splash.make_splash_mha_single_device(
        splash_mask.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(**blocks),
        attn_logits_soft_cap=cap,
    )
    mixed = jax.vmap(cast(Callable[..., Array], kernel))(
        query.swapaxes(1, 2), key, value, splash.SegmentIds(texts, texts)
    )
    return mixed.swapaxes(1, 2)[:, :length]
