"""A model of which only the top trains: the layers below are frozen, exist once, and run once per rollout.

    frozen      embedding, layers 0 … L − k − 1      runs once: tokens → frozen activations, float[B, T, D]
    trainable   layers L − k … L − 1, final norm, head      runs from the frozen activations on

With `trainable_layers=None` all parameters are trainable, `frozen` is an empty dict, and the frozen
activations are None: the same code trains everything.
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

from jax_rlhf.models.decoder import Decoder, Mask, Params, Tokens, abstract_params, compute_dtypes, logical_axes
from jax_rlhf.parallel import Layout, shardings as parallel_shardings

_BOTTOM = "embedding"


class SplitParams(struct.PyTreeNode):
    """Parameters in two parts.

    Attributes:
      frozen: the embedding and the bottom layers, each leaf [L − k, ...]; empty where everything trains.
      trainable: the rest, layers' leaves [k, ...].
    """

    frozen: Params
    trainable: Params


@dataclasses.dataclass(frozen=True)
class SplitModel:
    """A scanned decoder, and how many of its layers train.

    Attributes:
      model: the decoder.
      trainable_layers: k, from the top, 1 to L, with the final norm and the head (where that is not the embedding);
        None = all parameters.
    """

    model: Decoder
    trainable_layers: int | None = None

    def __post_init__(self) -> None:
        layers = self.model.config.num_layers
        if self.trainable_layers is not None and not 1 <= self.trainable_layers <= layers:
            raise ValueError(
                f"trainable_layers={self.trainable_layers} must lie within 1 and the model's {layers} layers; None "
                "trains everything."
            )
        if not self.model.scan_layers:
            raise ValueError("a SplitModel needs a model with scan_layers=True.")

    @property
    def first_layer(self) -> int:
        """The lowest layer that trains."""
        return 0 if self.trainable_layers is None else self.model.config.num_layers - self.trainable_layers

    def split(self, params: Params) -> SplitParams:
        """Cuts a whole tree of parameters in two."""
        parts = self._divided(params)
        if self.trainable_layers is None:
            return parts
        parts.trainable["layers"] = jax.tree.map(lambda leaf: leaf[self.first_layer :], params["layers"])
        if self.first_layer:
            parts.frozen["layers"] = jax.tree.map(lambda leaf: leaf[: self.first_layer], params["layers"])
        return parts

    def axes(self) -> SplitParams:
        """The logical names of the axes of both parts' parameters, as `logical_axes` gives them."""
        return self._divided(logical_axes(self.model))

    def compute_dtypes(self) -> SplitParams:
        """The dtype that each parameter of both parts is computed in, as `compute_dtypes` gives it."""
        return self._divided(compute_dtypes(self.model))

    def shardings(self, layout: Layout) -> SplitParams:
        """The `NamedSharding` of both parts' parameters.

        Raises:
          ValueError: the mesh does not divide one; says which sizes would.
        """
        axes = logical_axes(self.model)
        parallel_shardings(axes, abstract_params(self.model), layout)  # raises
        return self._divided(jax.tree.map(layout.sharding, axes, is_leaf=lambda x: isinstance(x, PartitionSpec)))

    def constrain(self, tree: Params) -> Params:
        """A tree of the trainable part (a gradient) with the sharding of those parameters, under jit."""
        layout = self.model.config.layout
        if layout is None:
            return tree
        return jax.tree.map(jax.lax.with_sharding_constraint, tree, self.shardings(layout).trainable)

    def _divided(self, tree: Params) -> SplitParams:
        """Which entries go where; both parts have the layers."""
        if self.trainable_layers is None:
            return SplitParams({}, tree)
        trainable = {name: value for name, value in tree.items() if name != _BOTTOM}
        frozen = {_BOTTOM: tree[_BOTTOM]} | ({"layers": tree["layers"]} if self.first_layer else {})
        return SplitParams(frozen, trainable)

    def join(self, params: SplitParams) -> Params:
        """The whole tree again, of the scanned form."""
        if "layers" not in params.frozen:
            return params.frozen | params.trainable
        layers = jax.tree.map(
            lambda below, above: jnp.concatenate([below, above]), params.frozen["layers"], params.trainable["layers"]
        )
        return params.frozen | params.trainable | {"layers": layers}

    def unstack(self, params: SplitParams) -> Params:
        """The whole tree of the unrolled form, without joining the stacks first."""
        whole = {name: value for part in (params.frozen, params.trainable) for name, value in part.items()}
        del whole["layers"]
        for index in range(self.model.config.num_layers):
            part, place = (
                (params.frozen, index) if index < self.first_layer else (params.trainable, index - self.first_layer)
            )
            whole[f"layers_{index}"] = jax.tree.map(operator.itemgetter(place), part["layers"])
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
        """Runs the frozen bottom.

        Args:
          params: the parameters.
          tokens: ids.
          mask: True = real token.
          positions, segments: of texts packed into one row, else None.

        Returns:
          The output of the lowest layers, or None where everything trains.
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
        """Runs the top from the frozen activations, or where everything trains from the tokens, to what the head reads.

        Args:
          params: the parameters.
          tokens: ids.
          mask: True = real token.
          frozen_activations: what `frozen_activations` returned.
          positions, segments: as there.
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
        """The parameters that `apply_head` reads: those of the top, and the embedding where the head is tied to it."""
        return params.frozen | params.trainable


def last_token_values(
    network: SplitModel, params: SplitParams, hidden: Float[Array, "B T E"], mask: Mask
) -> Float32[Array, "B"]:
    """What a scalar head says at the last real token of each row.

    Args:
      network: a model with a scalar head.
      params: its parameters.
      hidden: from `hidden_states`.
      mask: True = real token.

    Returns:
      In the head's unit: that of rewards.
    """
    last = jnp.max(jnp.where(mask, jnp.arange(mask.shape[1]), 0), axis=1)  # [B]
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]  # [B, E]
    return network.model.apply({"params": network.head_params(params)}, hidden, method="apply_head")


def text_scores(network: SplitModel, params: SplitParams, tokens: Tokens, mask: Mask) -> Float32[Array, "B"]:
    """The score of each text: what a scalar head says at its last real token.

    Args:
      network: a reward model.
      params: its parameters.
      tokens: ids.
      mask: True = real token.

    Returns:
      In reward units, without the model's bias.
    """
    activations = network.frozen_activations(params, tokens, mask)
    hidden = network.hidden_states(params, tokens, mask, activations)
    return last_token_values(network, params, hidden, mask)
