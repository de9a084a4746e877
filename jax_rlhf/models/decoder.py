"""One decoder for every family, as a Flax Linen module over plain parameter dicts.

    tokens ─ embed ─▶ x ─ layers ─▶ x ─ final norm, projection ─▶ hidden ─ head ─▶ logits or values

The layers are scanned by default (`params["layers"]` holds each leaf stacked `[L, ...]`), so that compile time does not
grow with depth; a `scan_layers=False` model runs the same layers unrolled over `params["layers_0"]`, …, which decodes
faster on CPUs and GPUs. `unstack_layers` turns the first form into the second.
"""

import operator
from typing import TYPE_CHECKING, Any, Literal

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Float, Float32, Int, PRNGKeyArray

from jax_rlhf.models.attention import Angles, Attention, AttentionContext, LayerCache, token_order
from jax_rlhf.models.cache import KVCache, decoder_angles
from jax_rlhf.models.config import DecoderConfig
from jax_rlhf.models.heads import LMHead, ScalarHead, logits_from_table
from jax_rlhf.models.layers import MLP, Norm, Projection, normal_init, partitioned
from jax_rlhf.models.lookup import look_up_rows
from jax_rlhf.parallel import constrained

Params = dict[str, Any]
Tokens = Int[Array | np.ndarray, "B T"]
Mask = Bool[Array | np.ndarray, "B T"]
Head = Literal["lm", "scalar"]

NORM_AXES = PartitionSpec("norm"), PartitionSpec("layers", "norm")  # computed in float32, of scales as stored
REMAT_POLICIES = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


class Embedding(nn.Module):
    """Token table, learned positions and input projection, where the config has them."""

    config: DecoderConfig

    def setup(self) -> None:  # noqa: D102
        config = self.config
        init = partitioned(normal_init, ("vocab", "embed"))
        self.table = self.param("table", init, (config.table_rows, config.output_size))
        if config.position_kind == "learned":
            init = partitioned(normal_init, (None, "embed"))
            rows = config.max_positions + config.position_offset
            self.positions = self.param("positions", init, (rows, config.hidden_size))
        if config.embedding_size:
            self.project_in = Projection(
                (config.embedding_size,), (config.hidden_size,), (None, "embed"), False, config.dtype
            )

    def __call__(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """What the first layer reads."""
        config = self.config
        x = look_up_rows(self.table, tokens, config)
        if config.embedding_scale != 1.0:
            x = x * jnp.asarray(config.embedding_scale, config.dtype)
        if config.embedding_size:
            x = self.project_in(x)
        if config.position_kind == "learned":
            x = x + look_up_rows(self.positions, positions + config.position_offset, config)
        return _residual(x, config)

    def attend(self, hidden: Float[Array, "*batch E"]) -> Float32[Array, "*batch V"]:
        """The logits of a tied head."""
        return logits_from_table(hidden, self.table, self.config)


def _residual(x: Float[Array, "B T D"], config: DecoderConfig) -> Float[Array, "B T D"]:
    return constrained(x, config.layout, "rows", "length", "hidden")


_Carry = tuple[Float[Array, "B T D"], LayerCache | None]


class DecoderLayer(nn.Module):
    """Attention and MLP, each with its norms and residual.

    Attributes:
      config: the model's.
      index: this layer's number where layers are unrolled; None where a scan passes it.
    """

    config: DecoderConfig
    index: int | None = None

    @nn.compact
    def __call__(self, carry: _Carry, context: AttentionContext, index: Int[Array, ""] | None) -> tuple[_Carry, None]:
        """The residual stream and the cache after this layer; the form that `nn.scan` wants."""
        config = self.config
        x, cache = carry
        layer = index if self.index is None else self.index
        assert layer is not None, "a scan passes the index of a layer that has none"
        before, after = config.norm_placement != "after", config.norm_placement == "both"

        inputs = Norm(config, name="attention_norm")(x) if before else x
        mixed, cache = Attention(config, name="attention")(inputs, context, layer, cache)
        if config.parallel_residual:
            x = x + mixed + MLP(config, name="mlp")(Norm(config, name="mlp_norm")(x))
            return (_residual(x, config), cache), None
        if after:
            mixed = Norm(config, name="attention_post_norm")(mixed)
        x = _residual(x + mixed, config)
        if not before:
            x = Norm(config, name="attention_norm")(x)

        inputs = Norm(config, name="mlp_norm")(x) if before else x
        mixed = MLP(config, name="mlp")(inputs)
        if after:
            mixed = Norm(config, name="mlp_post_norm")(mixed)
        x = _residual(x + mixed, config)
        if not before:
            x = Norm(config, name="mlp_norm")(x)
        return (x, cache), None


class Decoder(nn.Module):
    """A decoder-only transformer with a head.

    Attributes:
      config: what it is made of.
      head: "lm" (logits) or "scalar" (one value a token).
      scan_layers: layers stacked and scanned, or unrolled.
    """

    config: DecoderConfig
    head: Head = "lm"
    scan_layers: bool = True

    if TYPE_CHECKING:

        def apply(self, *args: Any, **kwargs: Any) -> Any:
            """Flax's `apply`, which returns a method's result alone where no variable changes, as here."""

    def setup(self) -> None:  # noqa: D102
        config = self.config
        self.embedding = Embedding(config)
        layer = DecoderLayer
        if config.remat != "none":
            layer = nn.remat(layer, policy=REMAT_POLICIES[config.remat], prevent_cse=not self.scan_layers)
        if self.scan_layers:
            self.layers: Any = nn.scan(
                layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, 0),  # pyright: ignore[reportArgumentType] -- one per argument
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(config)
        else:
            self.layers = [layer(config, index=index) for index in range(config.num_layers)]
        if config.final_norm:
            self.final_norm = Norm(config)
        if config.embedding_size:
            self.project_out = Projection(
                (config.hidden_size,), (config.embedding_size,), ("embed", None), False, config.dtype
            )
        if self.head == "scalar":
            self.scalar_head = ScalarHead(config)
        elif not config.tie_embeddings:
            self.lm_head = LMHead(config)

    def __call__(
        self, tokens: Tokens, positions: Tokens | None = None, mask: Mask | None = None
    ) -> Float32[Array, "B T *V"]:
        """Runs the model over whole rows.

        Args:
          tokens: ids.
          positions: in tokens; default: the count of real tokens before each one.
          mask: True = real token; pads may stand anywhere and have any id, and never change a real
            token's output. Default: all real.

        Returns:
          Head "lm": logits, [B, T, V]. Head "scalar": values, [B, T]. What stands at pads is finite and
          means nothing. A real token's id outside the vocabulary, or its position outside a learned table, turns its
          row to NaN.
        """
        return self.apply_head(self.hidden_states(tokens, positions, mask))

    def hidden_states(
        self,
        tokens: Tokens,
        positions: Tokens | None = None,
        mask: Mask | None = None,
        *,
        segments: Tokens | None = None,
        frozen_activations: Float[Array, "B T D"] | None = None,
        first_layer: int = 0,
    ) -> Float[Array, "B T E"]:
        """What the head reads: arguments as in `__call__`.

        `segments` keeps texts apart that are packed into one row; `positions` then count within each.

        With `frozen_activations`, the output of the layers below `first_layer` (`lower_layers`), only
        the layers from there on run, and `params["layers"]` has only them.
        """
        tokens, mask = _checked(tokens, positions, mask)
        query_order, key_order = token_order(mask)
        x, context = self._enter(
            tokens, positions, mask, query_order, key_order, frozen_activations=frozen_activations, segments=segments
        )
        x, _ = self._run_layers(x, None, context, range(first_layer, self.config.num_layers))
        return self._leave(x)

    def lower_layers(
        self,
        tokens: Tokens,
        positions: Tokens | None = None,
        mask: Mask | None = None,
        *,
        segments: Tokens | None = None,
        layers: int,
    ) -> Float[Array, "B T D"]:
        """The output of the first `layers` layers, for which `params["layers"]` need hold only those.

        Arguments as in `hidden_states`, which goes on from it: `frozen_activations=this, first_layer=layers`.
        """
        tokens, mask = _checked(tokens, positions, mask)
        query_order, key_order = token_order(mask)
        x, context = self._enter(tokens, positions, mask, query_order, key_order, segments=segments)
        return self._run_layers(x, None, context, range(layers))[0]

    def extend(
        self,
        tokens: Tokens,
        cache: KVCache,
        positions: Tokens | None = None,
        mask: Mask | None = None,
        *,
        span: int | None = None,
    ) -> tuple[Float[Array, "B T E"], KVCache]:
        """Appends T tokens to a cache and runs the model over them: a prompt at once, or a token at a time.

        Args:
          tokens: ids.
          cache: of the tokens before; room for T more must be left.
          positions: in tokens; default: the count of real tokens before each one, the cache's included.
          mask: True = real token. Default: all real.
          span: slots to attend to, at least those filled after this call: a prefill into an empty cache passes T.
            Default: the whole cache.

        Returns:
          (hidden states for `apply_head`, the cache with T more slots filled).
        """
        tokens, mask = _checked(tokens, positions, mask)
        capacity = cache.order.shape[1]
        span = capacity if span is None else span
        if not tokens.shape[1] <= span <= capacity:
            raise ValueError(f"{tokens.shape[1]} tokens, span {span}: the cache has {capacity} slots.")
        query_order, key_order = token_order(mask, cache.real)
        order = jax.lax.dynamic_update_slice(cache.order, key_order, (0, cache.length))
        order = constrained(order, self.config.layout, "rows", "length")
        angles = cache.angles if positions is None and tokens.shape[1] == 1 else None
        x, context = self._enter(
            tokens, positions, mask, query_order, order[:, :span], slot=cache.length, angles=angles
        )
        x, layers = self._run_layers(x, cache.layers, context, range(self.config.num_layers))
        real = cache.real + jnp.sum(mask, axis=1, dtype=jnp.int32)
        assert layers is not None, "there was a cache"
        angles = decoder_angles(self.config, real[:, None])
        return self._leave(x), KVCache(layers, order, real, cache.length + tokens.shape[1], angles)

    def apply_head(self, hidden: Float[Array, "*batch E"]) -> Float32[Array, "*batch_and_V"]:
        """Logits, [..., V], or values, [...]."""
        if self.head == "scalar":
            return self.scalar_head(hidden)
        return self.embedding.attend(hidden) if self.config.tie_embeddings else self.lm_head(hidden)

    def _enter(
        self,
        tokens: Int[Array, "B T"],
        positions: Tokens | None,
        mask: Bool[Array, "B T"],
        query_order: Int[Array, "B T"],
        key_order: Int[Array, "B S"],
        *,
        slot: Int[Array, ""] | None = None,
        segments: Tokens | None = None,
        frozen_activations: Float[Array, "B T D"] | None = None,
        angles: tuple[Angles | None, Angles | None] | None = None,
    ) -> tuple[Float[Array, "B T D"], AttentionContext]:
        config = self.config
        positions = query_order if positions is None else positions
        positions = jnp.where(mask, positions, 0)
        angles = decoder_angles(config, positions) if angles is None else angles
        # By rows, as the residual stream: XLA would cut them as draws are cut, and exchange masks in every layer.
        rows = lambda x: constrained(x, config.layout, "rows", *(None,) * (x.ndim - 1))  # noqa: E731
        query_order, key_order, (everywhere, local) = jax.tree.map(rows, (query_order, key_order, angles))
        segments = None if segments is None else jnp.asarray(segments)
        context = AttentionContext(query_order, key_order, everywhere, local, slot, segments)
        if frozen_activations is not None:
            return frozen_activations.astype(config.dtype), context
        # A pad's id is replaced, so that whatever stands there (−100, pad = EOS, an id past the table) has no effect.
        return self.embedding(jnp.where(mask, tokens, 0), positions), context

    def _run_layers(
        self,
        x: Float[Array, "B T D"],
        caches: LayerCache | tuple[LayerCache, ...] | None,
        context: AttentionContext,
        which: range,
    ) -> tuple[Float[Array, "B T D"], LayerCache | tuple[LayerCache, ...] | None]:
        if not which:
            return x, caches
        if self.scan_layers:
            (x, caches), _ = self.layers((x, caches), context, jnp.arange(which.start, which.stop))
            return x, caches
        filled = []
        for index in which:
            (x, cache), _ = self.layers[index]((x, None if caches is None else caches[index]), context, None)
            filled.append(cache)
        return x, None if caches is None else tuple(filled)

    def _leave(self, x: Float[Array, "B T D"]) -> Float[Array, "B T E"]:
        if self.config.final_norm:
            x = self.final_norm(x)
        return self.project_out(x) if self.config.embedding_size else x


def _checked(
    tokens: Tokens, positions: Tokens | None, mask: Mask | None
) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    tokens = jnp.asarray(tokens)
    mask = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask)
    chex.assert_rank(tokens, 2)
    chex.assert_type([tokens, mask], [int, bool])
    chex.assert_equal_shape([tokens, mask] if positions is None else [tokens, mask, positions])
    return tokens, mask


def _init(model: Decoder, key: PRNGKeyArray) -> Params:
    return dict(model.init(key, jnp.zeros((1, 1), jnp.int32)))["params"]


def init_params(model: Decoder, key: PRNGKeyArray) -> Params:
    """New float32 parameters: normal with standard deviation 0.02, norms 1, biases 0, a scalar head as `head_init`.

    Args:
      model: the model.
      key: a JAX random key.

    Returns:
      The parameters, as a nested dict of arrays.
    """
    return meta.unbox(jax.jit(_init, static_argnums=0)(model, key))


def abstract_params(model: Decoder) -> Params:
    """The parameters' shapes, without making them: a nested dict of `jax.ShapeDtypeStruct`, float32.

    Args:
      model: the model.

    Returns:
      The tree that `init_params` would return.
    """
    return meta.unbox(_boxed(model))


def logical_axes(model: Decoder) -> Params:
    """The logical name of each parameter's axes ("vocab", "embed", "heads", "mlp", "layers", …).

    Args:
      model: the model.

    Returns:
      A nested dict of `jax.sharding.PartitionSpec`; `parallel/layout.py` maps the names to mesh axes.
    """
    return nn.get_partition_spec(_boxed(model))


def compute_dtypes(model: Decoder) -> Params:
    """The dtype that each parameter is computed in: what trains is float32, what does not needs no more than this.

    Args:
      model: the model.

    Returns:
      A nested dict of dtypes: the config's, and float32 for norms and a scalar head.
    """
    axes = logical_axes(model)
    dtypes = jax.tree.map(
        lambda spec: jnp.dtype(jnp.float32) if spec in NORM_AXES else jnp.dtype(model.config.dtype),
        axes,
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )
    if "scalar_head" in dtypes:
        dtypes["scalar_head"] = {"kernel": jnp.dtype(jnp.float32)}
    return dtypes


def _boxed(model: Decoder) -> Params:
    return jax.eval_shape(lambda key: _init(model, key), jax.random.key(0))


def unstack_layers(params: Params, num_layers: int) -> Params:
    """Parameters of a scanned model as those of the same model unrolled.

    Args:
      params: with "layers", each leaf [L, ...].
      num_layers: L.

    Returns:
      With "layers_0" … instead, each leaf [...]; other entries as they are.
    """
    rest = {name: value for name, value in params.items() if name != "layers"}
    layers = [jax.tree.map(operator.itemgetter(index), params["layers"]) for index in range(num_layers)]
    return rest | {f"layers_{index}": layer for index, layer in enumerate(layers)}


def kernels_by_output(params: Params) -> Params:
    """An unrolled decoder's parameters with its layers' kernels turned round, for decoding on CPU (see `products.py`).

    A step of a model of 97 million parameters takes 20 ms instead of 30 with 8 rows, 90 instead of 125 with 64 (on 2
    cores, Zen 4).

    Args:
      params: with "layers_0", ….

    Returns:
      The same, with "kernel_by_output" [*outputs, *inputs] instead of each "kernel" of the layers.
    """
    turned: dict[tuple[str, ...], Array] = {}
    leaves: dict[tuple[str, ...], Array] = flatten_dict(params)  # pyright: ignore[reportAssignmentType]
    for path, leaf in leaves.items():
        if path[0].startswith("layers_") and path[-1] == "kernel":
            count = 2 if path[-2] == "out" else 1  # attention's output sums over heads and head_dim
            turned[(*path[:-1], "kernel_by_output")] = leaf.transpose(*range(count, leaf.ndim), *range(count))
        else:
            turned[path] = leaf
    return unflatten_dict(turned)
