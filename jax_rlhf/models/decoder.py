"""One decoder for all model families, as a Flax Linen module with plain parameter dicts.

    tokens ─ embed ─▶ x ─ layers ─▶ x ─ final norm, projection ─▶ hidden ─ head ─▶ logits or values

By default the layers are scanned, so that compile time does not grow with depth: leaves of `params["layers"]` are
stacked, `[L, ...]`. With `scan_layers=False` the same layers are unrolled over `params["layers_0"]`, …, which decodes
faster on CPU and GPU. `unstack_layers` converts scanned parameters to unrolled ones.
"""

from typing import TYPE_CHECKING, Any, Literal

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Float32, Int

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

REMAT_POLICIES = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


class Embedding(nn.Module):
    """The token embedding, and learned positions and an input projection if the config has them."""

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
        """The first layer's input."""
        config = self.config
        x = look_up_rows(self.table, tokens, config)  # [B, T, E]
        if config.embedding_scale != 1.0:
            x = x * jnp.asarray(config.embedding_scale, config.dtype)
        if config.embedding_size:
            x = self.project_in(x)  # [B, T, D]
        if config.position_kind == "learned":
            x = x + look_up_rows(self.positions, positions + config.position_offset, config)
        return _residual(x, config)

    def attend(self, hidden: Float[Array, "*batch E"]) -> Float32[Array, "*batch V"]:
        """The logits of a tied LM head."""
        return logits_from_table(hidden, self.table, self.config)


def _residual(x: Float[Array, "B T D"], config: DecoderConfig) -> Float[Array, "B T D"]:
    return constrained(x, config.layout, "rows", "length", "hidden")


_Carry = tuple[Float[Array, "B T D"], LayerCache | None]


class DecoderLayer(nn.Module):
    """Attention and MLP, each with its norms and residual.

    Attributes:
      config: the model's.
      index: index of an unrolled layer; None if a scan passes it.
    """

    config: DecoderConfig
    index: int | None = None

    @nn.compact
    def __call__(self, carry: _Carry, context: AttentionContext, index: Int[Array, ""] | None) -> tuple[_Carry, None]:
        """((residual stream, cache) after this layer, None): the signature that `nn.scan` requires."""
        config = self.config
        x, cache = carry
        layer = index if self.index is None else self.index
        assert layer is not None, "the layer has neither an index of its own nor one from the scan"
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
      config: the architecture.
      head: "lm" (logits) or "scalar" (one value per token).
      scan_layers: True = stacked and scanned layers, False = unrolled layers.
    """

    config: DecoderConfig
    head: Head = "lm"
    scan_layers: bool = True

    if TYPE_CHECKING:

        def apply(self, *args: Any, **kwargs: Any) -> Any:
            """Flax's `apply`; it returns only the method's result, since no variable is mutable here."""

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
                # The check traces the layer a second time. `init` keeps it: without it, its random numbers change.
                check_constancy_invariants=self.is_initializing(),
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
          positions: in tokens; default: the number of real tokens before each token.
          mask: True = real token. Pads may be anywhere and have any id, and never affect the output of a real token.
            Default: all real.

        Returns:
          Head "lm": logits, [B, T, V]. Head "scalar": values, [B, T]. Outputs at pads are finite and meaningless. A
          real token with an id outside the vocabulary, or a position outside a learned table, makes its row NaN.
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
        """The head's input.

        Args:
          tokens, positions, mask: as in `__call__`.
          segments: indices of texts packed into one row, which do not attend to each other; `positions` then count
            within each text.
          frozen_activations: the output of `lower_layers`. Only the layers from `first_layer` on run then, and
            `params["layers"]` contains only those.
          first_layer: index of the first layer to run.
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
        """The output of the first `layers` layers; `params["layers"]` may contain only those.

        Arguments as in `hidden_states`, which continues with `frozen_activations=output, first_layer=layers`.
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
        """Appends T tokens to a KV cache and runs the model over them: a whole prompt (prefill), or one token (decode).

        Args:
          tokens: ids.
          cache: of the previous tokens, with T or more empty slots.
          positions: in tokens; default: the number of real tokens before each token, including those in the cache.
          mask: True = real token. Default: all real.
          span: number of slots to attend to, at least those filled after this call; T for a prefill into an empty
            cache. Default: the whole cache.

        Returns:
          (hidden states for `apply_head`, the cache with T more slots filled).
        """
        tokens, mask = _checked(tokens, positions, mask)
        capacity = cache.order.shape[1]
        span = capacity if span is None else span
        if not tokens.shape[1] <= span <= capacity:
            raise ValueError(
                f"span={span} must lie between the {tokens.shape[1]} new tokens and the {capacity} slots of the cache."
            )
        query_order, key_order = token_order(mask, cache.real)
        order = jax.lax.dynamic_update_slice(cache.order, key_order, (0, cache.length))
        order = constrained(order, self.config.layout, "rows", "length")
        angles = cache.angles if positions is None and tokens.shape[1] == 1 else None
        x, context = self._enter(
            tokens, positions, mask, query_order, order[:, :span], slot=cache.length, angles=angles
        )
        x, layers = self._run_layers(x, cache.layers, context, range(self.config.num_layers))
        real = cache.real + jnp.sum(mask, axis=1, dtype=jnp.int32)
        assert layers is not None, "with a cache, _run_layers returns one"
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
        # Sharded by rows, like the residual stream. Otherwise XLA would shard them like the draws of sampling, and
        # reshard the masks in every layer.
        rows = lambda x: constrained(x, config.layout, "rows", *(None,) * (x.ndim - 1))  # noqa: E731
        query_order, key_order, (everywhere, local) = jax.tree.map(rows, (query_order, key_order, angles))
        segments = None if segments is None else jnp.asarray(segments)
        context = AttentionContext(query_order, key_order, everywhere, local, slot, segments)
        if frozen_activations is not None:
            return frozen_activations.astype(config.dtype), context
        # Ids at pads are replaced, so that any id there (−100, EOS, one outside the table) has no effect.
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
