"""A model whose top k layers are trainable. The frozen layers below can be shared, and run once per rollout.

    frozen      embedding, layers 0 … L − k − 1             tokens → frozen activations [B, T, D], once per rollout
    trainable   layers L − k … L − 1, final norm, head      frozen activations → outputs

With `trainable_layers=None` all parameters are trainable, `frozen` is an empty dict, and the frozen activations are
None, so that the same code handles full training.
"""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.sharding import PartitionSpec
from jaxtyping import Float, Float32

from jax_rlhf.models.decoder import Decoder, Mask, Params, Tokens
from jax_rlhf.models.parameters import abstract_params, compute_dtypes, logical_axes
from jax_rlhf.parallel import Layout, shardings as parallel_shardings

_BOTTOM = "embedding"


class SplitParams(struct.PyTreeNode):
    """Parameters, split into frozen and trainable.

    Attributes:
      frozen: the embedding and the bottom layers, whose leaves are [L − k, ...]; empty if all parameters are trainable.
      trainable: the rest; leaves of layers are [k, ...].
    """

    frozen: Params
    trainable: Params


@dataclasses.dataclass(frozen=True)
class SplitModel:
    """A scanned decoder and the number of its trainable layers.

    Attributes:
      model: the decoder.
      trainable_layers: k, 1 to L, counted from the top. The final norm is trainable too, and the head unless it is tied
        to the embedding. None = all parameters are trainable.
    """

    model: Decoder
    trainable_layers: int | None = None

    def __post_init__(self) -> None:
        layers = self.model.config.num_layers
        if self.trainable_layers is not None and not 1 <= self.trainable_layers <= layers:
            raise ValueError(
                f"trainable_layers={self.trainable_layers} must be from 1 to the model's {layers} layers; None trains "
                "all parameters."
            )
        if not self.model.scan_layers:
            raise ValueError("a SplitModel needs a model with scan_layers=True.")

    @property
    def first_layer(self) -> int:
        """Index of the lowest trainable layer."""
        return 0 if self.trainable_layers is None else self.model.config.num_layers - self.trainable_layers

    def split(self, params: Params) -> SplitParams:
        """Splits the parameters of the whole model."""
        parts = self._divided(params)
        if self.trainable_layers is None:
            return parts
        parts.trainable["layers"] = jax.tree.map(lambda leaf: leaf[self.first_layer :], params["layers"])
        if self.first_layer:
            parts.frozen["layers"] = jax.tree.map(lambda leaf: leaf[: self.first_layer], params["layers"])
        return parts

    def axes(self) -> SplitParams:
        """`logical_axes` of the model, split."""
        return self._divided(logical_axes(self.model))

    def compute_dtypes(self) -> SplitParams:
        """`compute_dtypes` of the model, split."""
        return self._divided(compute_dtypes(self.model))

    def shardings(self, layout: Layout) -> SplitParams:
        """The `NamedSharding` of each parameter, split.

        Raises:
          ValueError: the mesh does not divide a parameter; the message lists sizes that would work.
        """
        axes = logical_axes(self.model)
        parallel_shardings(axes, abstract_params(self.model), layout)  # raises
        return self._divided(jax.tree.map(layout.sharding, axes, is_leaf=lambda x: isinstance(x, PartitionSpec)))

    def constrain(self, tree: Params) -> Params:
        """Constrains a tree of the trainable part, such as a gradient, to the parameters' sharding; under jit."""
        layout = self.model.config.layout
        if layout is None:
            return tree
        return jax.tree.map(jax.lax.with_sharding_constraint, tree, self.shardings(layout).trainable)

    def _divided(self, tree: Params) -> SplitParams:
        """Splits the top-level entries of a tree; both parts get all of "layers"."""
        if self.trainable_layers is None:
            return SplitParams({}, tree)
        trainable = {name: value for name, value in tree.items() if name != _BOTTOM}
        frozen = {_BOTTOM: tree[_BOTTOM]} | ({"layers": tree["layers"]} if self.first_layer else {})
        return SplitParams(frozen, trainable)

    def join(self, params: SplitParams) -> Params:
        """The parameters of the whole model, with scanned layers; the inverse of `split`."""
        if "layers" not in params.frozen:
            return params.frozen | params.trainable
        layers = jax.tree.map(
            lambda below, above: jnp.concatenate([below, above]), params.frozen["layers"], params.trainable["layers"]
        )
        return params.frozen | params.trainable | {"layers": layers}

    def unstack(self, params: SplitParams) -> Params:
        """The parameters of the whole model with unrolled layers, without concatenating the stacked layers first."""
        whole = {name: value for part in (params.frozen, params.trainable) for name, value in part.items()}
        del whole["layers"]
        for index in range(self.model.config.num_layers):
            part, position = (
                (params.frozen, index) if index < self.first_layer else (params.trainable, index - self.first_layer)
            )
            whole[f"layers_{index}"] = jax.tree.map(operator.itemgetter(position), part["layers"])
        return whole

    def frozen_activations(
        self,
        params: SplitParams,
        tokens: Tokens,
        mask: Mask,
        *,
        positions: Tokens | None = None,
        segments: Tokens | None = None,
    ) -> Float[Array, "B T D"] | None:
        """Runs the frozen layers.

        Args:
          params: the parameters.
          tokens: ids.
          mask: True = real token.
          positions, segments: of texts packed into one row, else None.

        Returns:
          The output of the frozen layers; None if all parameters are trainable.
        """
        if self.trainable_layers is None:
            return None
        run = functools.partial(self.model.apply, {"params": params.frozen}, method="lower_layers")
        return run(tokens, positions, mask, segments=segments, layers=self.first_layer)

    def hidden_states(
        self,
        params: SplitParams,
        tokens: Tokens,
        mask: Mask,
        frozen_activations: Float[Array, "B T D"] | None,
        *,
        positions: Tokens | None = None,
        segments: Tokens | None = None,
    ) -> Float[Array, "B T E"]:
        """Runs the trainable layers, from the frozen activations (or from the tokens) to the head's input.

        Args:
          params: the parameters.
          tokens: ids.
          mask: True = real token.
          frozen_activations: the result of `frozen_activations`.
          positions, segments: of texts packed into one row, else None.
        """
        return self.model.apply(
            {"params": params.trainable},
            tokens,
            positions,
            mask,
            segments=segments,
            frozen_activations=frozen_activations,
            first_layer=self.first_layer,
            method="hidden_states",
        )

    def head_params(self, params: SplitParams) -> Params:
        """Parameters for `apply_head`; they include the embedding, to which the head may be tied."""
        return params.frozen | params.trainable


def last_token_values(
    network: SplitModel, params: SplitParams, hidden: Float[Array, "B T E"], mask: Mask
) -> Float32[Array, "B"]:
    """The output of a scalar head at the last real token of each row, in reward units; hidden: from `hidden_states`."""
    last = jnp.max(jnp.where(mask, jnp.arange(mask.shape[1]), 0), axis=1)  # [B]
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]  # [B, E]
    return network.model.apply({"params": network.head_params(params)}, hidden, method="apply_head")


def text_scores(network: SplitModel, params: SplitParams, tokens: Tokens, mask: Mask) -> Float32[Array, "B"]:
    """A reward model's score of each text, at its last real token, in reward units, without the model's bias."""
    activations = network.frozen_activations(params, tokens, mask)
    hidden = network.hidden_states(params, tokens, mask, activations)
    return last_token_values(network, params, hidden, mask)
