"""Causal attention: who may see whom, the plain XLA form, and its module.

Masks come from one number a token, its *order*: how many real tokens stand before it in its row. A pad as a key has the
order `NOT_REAL`. A query sees a key when key order ≤ query order, and in a sliding-window layer when also
query order − key order < window. So pads take no room in a window and may stand anywhere:

    tokens        pad  a    b    pad  c
    key order     ∞    0    1    ∞    2
    query order   -1   0    1    1    2        c sees a, b, c; with window 2: b, c
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jaxtyping import Bool, Float, Float32, Int

from jax_rlhf.models.config import DecoderConfig
from jax_rlhf.models.flash import flash_attend, uses_flash
from jax_rlhf.models.layers import Norm, Projection, softcap
from jax_rlhf.models.precision import product_precision
from jax_rlhf.models.rotary import rotate
from jax_rlhf.parallel import constrained

NOT_REAL = jnp.iinfo(jnp.int32).max
MASKED_SCORE = jnp.finfo(jnp.float32).min  # finite: a row that sees nothing (a pad) gets an average, not NaN

Angles = tuple[Float32[Array, "B T 1 pairs"], Float32[Array, "B T 1 pairs"]]
"""Cosines and sines; the 1 stands for the heads."""
LayerCache = tuple[Float[Array, "*L B K S head_dim"], Float[Array, "*L B K S head_dim"]]
"""Keys and values of a layer, or of all layers with L in front."""


class AttentionContext(struct.PyTreeNode):
    """What every layer's attention needs to know of the T tokens at hand and the S tokens that they may see.

    Attributes:
      query_order: of the T tokens.
      key_order: of the S tokens, `NOT_REAL` for pads and empty cache slots.
      angles: rotation of the T tokens; None with learned positions.
      local_angles: the same for sliding-window layers where they have their own, else None.
      slot: cache slot of the first of the T tokens; None without a cache.
      segments: of texts packed into one row, which do not see each other; None = each row is one text.
    """

    query_order: Int[Array, "B T"]
    key_order: Int[Array, "B S"]
    angles: Angles | None
    local_angles: Angles | None
    slot: Int[Array, ""] | None = None
    segments: Int[Array, "B T"] | None = None


def token_order(
    mask: Bool[Array, "B T"], start: Int[Array, "B"] | int = 0
) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """The order of each token, as a query and as a key.

    Args:
      mask: True = real token.
      start: real tokens that came before these.

    Returns:
      (query_order, key_order).
    """
    order = jnp.asarray(start, jnp.int32).reshape(-1, 1) + jnp.cumsum(mask.astype(jnp.int32), axis=1) - 1
    return order, jnp.where(mask, order, NOT_REAL)


def visible(context: AttentionContext, window: Int[Array, ""] | int | None) -> Bool[Array, "B T S"]:
    """Who may see whom: see the module's docstring.

    Args:
      context: orders of queries and keys.
      window: tokens that a query sees, itself included; None = all before it.

    Returns:
      True = the query sees the key.
    """
    query, key = context.query_order[:, :, None], context.key_order[:, None, :]
    allowed = key <= query
    if context.segments is not None:
        allowed = allowed & (context.segments[:, :, None] == context.segments[:, None, :])
    return allowed if window is None else allowed & (query - key < window)


def attend(
    query: Float[Array, "B T H head_dim"],
    key: Float[Array, "B K S head_dim"],
    value: Float[Array, "B K S head_dim"],
    allowed: Bool[Array, "B T S"],
    *,
    scale: Float[Array, ""] | float,
    cap: float | None = None,
) -> Float[Array, "B T H head_dim"]:
    """softmax(cap(scale · q kᵀ)) v over the allowed keys, with H query heads on K key/value heads.

    Args:
      query: of the T tokens at hand.
      key, value: of the S tokens that they may see.
      allowed: True = the query sees the key.
      scale: on q·k.
      cap: soft cap on the scores, or None.

    Returns:
      The mixed values, in value's dtype; scores and softmax are float32.

    Source: Vaswani et al. 2017; grouped queries: Ainslie et al. 2023.
    """
    batch, length, heads, width = query.shape
    kv_heads, group = key.shape[1], heads // key.shape[1]
    # A group's queries become rows of one matrix a key/value head: [B, K, G · T, head_dim]. One batched product on CPU,
    # where the same einsum over separate G and T axes took 3.7 × as long (one token, 64 rows, 9 heads on 3, 2 cores).
    rows = query.reshape(batch, length, kv_heads, group, width).transpose(0, 2, 3, 1, 4)
    rows = rows.reshape(batch, kv_heads, group * length, width)
    product = functools.partial(jnp.einsum, precision=product_precision(value.dtype))
    scores = product("bkmd,bksd->bkms", rows, key, preferred_element_type=jnp.float32) * scale
    scores = softcap(scores, cap).reshape(batch, kv_heads, group, length, -1)  # [B, K, G, T, S]
    weights = jax.nn.softmax(jnp.where(allowed[:, None, None], scores, MASKED_SCORE), axis=-1).astype(value.dtype)
    mixed = product("bkms,bksd->bkmd", weights.reshape(batch, kv_heads, group * length, -1), value)
    return mixed.reshape(batch, kv_heads, group, length, width).transpose(0, 3, 1, 2, 4).reshape(query.shape)


def _write(
    cache: LayerCache,
    layer: Int[Array, ""] | int,
    slot: Int[Array, ""],
    keys: Float[Array, "B K T head_dim"],
    values: Float[Array, "B K T head_dim"],
) -> LayerCache:
    stacked = cache[0].ndim == 5  # one array for all layers, carried through a scan
    start = (layer, 0, 0, slot, 0) if stacked else (0, 0, slot, 0)

    def put(buffer: Float[Array, "*L B K S head_dim"], new: Float[Array, "B K T head_dim"]) -> Float[Array, "..."]:
        new = new.astype(buffer.dtype)
        return jax.lax.dynamic_update_slice(buffer, new[None] if stacked else new, start)

    return put(cache[0], keys), put(cache[1], values)


def _read(
    cache: LayerCache, layer: Int[Array, ""] | int, span: int
) -> tuple[Float[Array, "B K span head_dim"], Float[Array, "B K span head_dim"]]:
    # The first `span` slots of one layer: prefill need not look at the empty rest.
    if cache[0].ndim == 4:
        return cache[0][:, :, :span], cache[1][:, :, :span]
    size = (1, *cache[0].shape[1:3], span, cache[0].shape[4])
    keys, values = (jax.lax.dynamic_slice(buffer, (layer, 0, 0, 0, 0), size)[0] for buffer in cache)
    return keys, values


class Attention(nn.Module):
    """Multi-head causal attention over the tokens at hand, or over a cache that they are first written to."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: AttentionContext,
        layer: Int[Array, ""] | int,
        cache: LayerCache | None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """What the block adds to the residual stream, and the cache with T more tokens; `layer` is its index."""
        config = self.config
        sliding = self._sliding(layer)

        def project(name: str, heads: int, axis: str) -> Float[Array, "B T heads head_dim"]:
            return Projection(
                (config.hidden_size,),
                (heads, config.head_dim),
                ("embed", axis, "head_dim"),
                config.qkv_bias,
                config.dtype,
                name=name,
            )(x)

        query = project("query", config.num_heads, "heads")
        key = project("key", config.num_kv_heads, "kv_heads")
        value = project("value", config.num_kv_heads, "kv_heads")
        if config.qk_norm:
            query, key = Norm(config, name="query_norm")(query), Norm(config, name="key_norm")(key)
        if context.angles is not None:
            cos, sin = self._angles(context.angles, context.local_angles, sliding)
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        key, value = jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)  # [B, K, T, head_dim], the cache's layout
        query = constrained(query, config.layout, "rows", "length", "heads", "head_dim")
        key, value = (constrained(x, config.layout, "rows", "kv_heads", "length", "head_dim") for x in (key, value))
        if cache is not None:
            assert context.slot is not None, "a cache comes with the slot that is filled next"
            cache = _write(cache, layer, context.slot, key, value)
            key, value = _read(cache, layer, context.key_order.shape[1])

        scale = config.attention_scale / (layer + 1) if config.scale_by_layer else config.attention_scale
        # With the tokens at hand alone: each row is whole, or the cache was empty.
        if uses_flash(config, x.shape[1]) and context.key_order.shape[1] == x.shape[1]:
            mixed = self._flash(query, key, value, context, sliding, scale)
        else:
            allowed = constrained(visible(context, self._window(sliding)), config.layout, "rows", "length", "length")
            mixed = attend(query, key, value, allowed, scale=scale, cap=config.attention_softcap)
        mixed = constrained(mixed, config.layout, "rows", "length", "heads", "head_dim")
        out = Projection(
            (config.num_heads, config.head_dim),
            (config.hidden_size,),
            ("heads", "head_dim", "embed"),
            config.out_bias,
            config.dtype,
            name="out",
        )
        return out(mixed), cache

    def _flash(
        self,
        query: Float[Array, "B T H head_dim"],
        key: Float[Array, "B K T head_dim"],
        value: Float[Array, "B K T head_dim"],
        context: AttentionContext,
        sliding: Bool[Array, ""] | bool,
        scale: Float[Array, ""] | float,
    ) -> Float[Array, "B T H head_dim"]:
        def run(window: int | None) -> Float[Array, "B T H head_dim"]:
            real = context.key_order != NOT_REAL
            config = self.config
            return flash_attend(query, key, value, real, context.segments, config=config, window=window, scale=scale)

        if isinstance(sliding, bool):
            return run(self.config.sliding_window if sliding else None)
        # A kernel's window is part of it: a scan over layers of both kinds holds both.
        return jax.lax.cond(sliding, lambda: run(self.config.sliding_window), lambda: run(None))

    def _sliding(self, layer: Int[Array, ""] | int) -> Bool[Array, ""] | bool:
        # A Python bool where it can be (all layers alike, or unrolled layers), else looked up by the scanned index.
        kinds = self.config.sliding_layers or (False,)
        if all(kinds) or not any(kinds):
            return kinds[0]
        return kinds[layer] if isinstance(layer, int) else jnp.asarray(kinds)[layer]

    def _window(self, sliding: Bool[Array, ""] | bool) -> Int[Array, ""] | int | None:
        window = self.config.sliding_window
        if isinstance(sliding, bool):
            return window if sliding else None
        assert window is not None, "the config has a window where it marks layers"
        return jnp.where(sliding, window, NOT_REAL)

    def _angles(self, angles: Angles, local: Angles | None, sliding: Bool[Array, ""] | bool) -> Angles:
        if local is None:
            return angles
        if isinstance(sliding, bool):
            return local if sliding else angles
        return jax.tree.map(lambda local, other: jnp.where(sliding, local, other), local, angles)
