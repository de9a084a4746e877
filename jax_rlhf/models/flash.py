"""Attention that never holds its T × T scores: cuDNN's flash attention on GPU, the splash kernel of JAX on TPU.

For whole rows: scoring, training, the prefill of an empty cache. Both kernels go by places in the row where
`attention.py` goes by the order of real tokens, which differ where pads stand between. Without a sliding window that
matters only for who is real: to the splash kernel pads are a text of their own. Otherwise, and for cuDNN, which takes
lengths, real tokens are first moved to the front of their row.

A decoder asks for this with `DecoderConfig.attention="flash"`; on CPU, and for rows of fewer than `MIN_LENGTH` tokens,
that means the plain form.
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

MIN_LENGTH = 128  # a block of the splash kernel; below, all scores fit in a block


def check_flash(config: DecoderConfig) -> None:
    """Whether a decoder that asks for flash attention can have it where it runs.

    Args:
      config: the decoder's, with its layout and dtype.

    Raises:
      ValueError: the kernel of its platform lacks something; says what, and what to set instead.
    """
    if config.attention != "flash" or config.platform == "cpu":
        return
    problems = []
    if config.platform == "gpu":
        if config.dtype not in (jnp.bfloat16, jnp.float16):
            problems.append(f"computes in 16 bits, and dtype is {config.dtype}")
        if config.head_dim > 256 or config.head_dim % 8:
            problems.append(f"takes heads of up to 256 numbers, a multiple of 8, and head_dim is {config.head_dim}")
        if config.attention_softcap is not None:
            problems.append(f"has no soft cap, and attention_softcap is {config.attention_softcap}")
    if config.layout is not None and config.layout.num_shards("heads") != config.layout.num_shards("kv_heads"):
        problems.append("needs heads and kv_heads cut alike, and config.mesh.rules cuts them differently")
    if problems:
        kernel = "cuDNN" if config.platform == "gpu" else "the splash kernel"
        raise ValueError(f'attention="flash": {kernel} {"; ".join(problems)}. Set attention="xla" for this model.')


def uses_flash(config: DecoderConfig, length: int) -> bool:
    """Whether rows of so many tokens go through a kernel.

    Args:
      config: the decoder's.
      length: T.

    Returns:
      True for the kernel, False for the plain form.
    """
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
    """What `attention.attend` computes over `attention.visible`, without its scores in memory.

    Args:
      query: of whole rows.
      key, value: of the same tokens.
      real: False = pad.
      segments: of texts packed into a row, from 0; None = each row is one text.
      config: the decoder's: soft cap, platform, layout.
      window: tokens that a query sees, itself included; None = all before it.
      scale: on q·k.

    Returns:
      The mixed values, in query's dtype. What stands at pads is finite and means nothing.

    Raises:
      ValueError: see `check_flash`.

    Source: Dao et al. 2022, "FlashAttention"; the kernels are NVIDIA's cuDNN and JAX's own.
    """
    check_flash(config)
    if window is not None and window >= query.shape[1]:
        window = None
    if config.platform == "gpu":
        if not isinstance(scale, float):  # it takes a constant
            query, scale = _scaled(query, scale), 1.0
        kernel = partial(_at_the_front, partial(_cudnn_attend, window=window, scale=scale))
    else:
        kernel, query = partial(_splash_attend, window=window, cap=config.attention_softcap), _scaled(query, scale)
        if window is not None:
            kernel = partial(_at_the_front, kernel)
    return _on_each_device(kernel, config.layout)(query, key, value, real, segments)


def _scaled(query: Queries, scale: Float[Array, ""] | float) -> Queries:
    return (query.astype(jnp.float32) * scale).astype(query.dtype)


def _on_each_device(kernel: Kernel, layout: Layout | None) -> Kernel:
    # XLA cannot partition a kernel: each device runs it over its rows and heads.
    if layout is None:
        return kernel

    def run(query: Queries, key: Keys, value: Keys, real: Real, segments: Segments) -> Queries:
        rows = layout.spec(("rows", None), real.shape)
        queries = layout.spec(("rows", None, "heads", None), query.shape)
        keys = layout.spec(("rows", "kv_heads", None, None), key.shape)
        specs = (queries, keys, keys, rows, rows)
        everywhere = jax.shard_map(kernel, mesh=layout.mesh, in_specs=specs, out_specs=queries, check_vma=False)
        return everywhere(query, key, value, real, segments)

    return run


def _at_the_front(kernel: Kernel, query: Queries, key: Keys, value: Keys, real: Real, segments: Segments) -> Queries:
    # A stable sort keeps the order of real tokens; their places in the row are then their orders.
    forth = jnp.argsort(~real, axis=1, stable=True)  # [B, T]
    back = jnp.argsort(forth, axis=1)  # [B, T]
    moved = partial(_moved, forth=forth, back=back)
    if segments is not None:
        segments = jnp.take_along_axis(segments, forth, axis=1)
    query = moved(query, axis=1)
    key, value = moved(key, axis=2), moved(value, axis=2)
    mixed = kernel(query, key, value, jnp.take_along_axis(real, forth, axis=1), segments)
    return _moved(mixed, forth=back, back=forth, axis=1)


def _moved(
    x: Float[Array, "*shape"], *, forth: Int[Array, "B T"], back: Int[Array, "B T"], axis: int
) -> Float[Array, "*shape"]:
    """x[b, forth[b, t]]; its gradient is the way back, where JAX would scatter."""

    def take(x: Float[Array, "*shape"], places: Int[Array, "B T"]) -> Float[Array, "*shape"]:
        shape = [1] * x.ndim
        shape[0], shape[axis] = places.shape
        return jnp.take_along_axis(x, places.reshape(shape), axis=axis)

    @jax.custom_vjp
    def move(x: Float[Array, "*shape"], forth: Int[Array, "B T"], back: Int[Array, "B T"]) -> Float[Array, "*shape"]:
        del back
        return take(x, forth)

    move.defvjp(
        lambda x, forth, back: (take(x, forth), back), lambda back, gradient: (take(gradient, back), None, None)
    )
    return move(x, forth, back)


def _lengthened(x: Shaped[Array, "..."], axis: int, by: int) -> Shaped[Array, "..."]:
    return x if by == 0 else jnp.pad(x, [(0, by if index == axis else 0) for index in range(x.ndim)])


def _cudnn_attend(
    query: Queries, key: Keys, value: Keys, real: Real, segments: Segments, *, window: int | None, scale: float
) -> Queries:
    """Real tokens stand at the front."""
    length, mask = query.shape[1], None
    lengths = jnp.maximum(jnp.sum(real, axis=1, dtype=jnp.int32), 1)  # an empty row sees its first pad
    # What cuDNN leaves behind the lengths, in results and in gradients, it does not say.
    query, key, value = _without_pads(query, real, 1), _without_pads(key, real, 2), _without_pads(value, real, 2)
    if segments is not None:
        # cuDNN wants an even number of columns. A bit for two tokens, where scores would take 32 · H.
        odd = length % 2
        query, segments = _lengthened(query, 1, odd), _lengthened(segments, 1, odd)
        key, value = _lengthened(key, 2, odd), _lengthened(value, 2, odd)
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
    """Real tokens stand at the front if there is a window; pads are a text of their own."""
    length, heads = query.shape[1], query.shape[2]
    texts = jnp.where(real, 1 if segments is None else segments + 1, 0)
    # The largest block that does not lengthen a row by more than an eighth.
    block = next(size for size in (512, 256, 128) if size == 128 or math.ceil(length / size) * size <= 1.125 * length)
    by = -length % block
    query, texts = _lengthened(query, 1, by), _lengthened(texts, 1, by)
    key, value = _lengthened(key, 2, by), _lengthened(value, 2, by)
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
