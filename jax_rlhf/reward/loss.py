"""The losses of a reward model, and the model that its training starts from."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from jax_rlhf.data import PackedPairs, PairBatch
from jax_rlhf.hub import Pretrained
from jax_rlhf.models import Decoder
from jax_rlhf.models.layers import head_init
from jax_rlhf.models.split import SplitModel, SplitParams, text_scores
from jax_rlhf.optim.supervised import Sums
from jax_rlhf.rl import bradley_terry_loss, masked_sum, token_ranking_loss
from jax_rlhf.rl.types import AnyArray


@dataclasses.dataclass(frozen=True)
class RewardLoss:
    """The ranking loss of a reward model on pairs of answers.

    Attributes:
      loss: "bradley_terry", on the scores at the last tokens; "token": DeepSpeed-Chat's, on the values of all tokens
        from the first one at which the answers differ.
      compare: "pairs" compares each chosen answer with its own rejected one; "all" with every rejected answer of the
        batch, for data whose pairs are arbitrary, such as texts with labels.
    """

    loss: Literal["bradley_terry", "token"] = "bradley_terry"
    compare: Literal["pairs", "all"] = "pairs"

    def __call__(self, network: SplitModel, params: SplitParams, batch: PairBatch | PackedPairs) -> Sums:
        """The loss and metrics, summed over a batch.

        Args:
          network: a model with a scalar head.
          params: its parameters.
          batch: B pairs, or rows of packed pairs, which the token loss does not support.

        Returns:
          Sums, float32[] each: "loss" in nats, "accuracy" (1 if chosen scores above rejected), "margin" (chosen −
          rejected) in reward units, "count" of comparisons.
        """
        params = SplitParams(jax.lax.stop_gradient(params.frozen), params.trainable)
        if self.loss == "token":
            assert isinstance(batch, PairBatch), "the token loss takes no packed pairs"
            chosen, rejected, loss = _token_loss(network, params, batch)
            real = jnp.any(batch.chosen_mask, axis=1)
        else:
            chosen, rejected, real = pair_scores(network, params, batch)
        if self.compare == "all":
            chosen, rejected = (x.reshape(-1) for x in jnp.broadcast_arrays(chosen[:, None], rejected[None]))
            real = (real[:, None] & real[None]).reshape(-1)
        if self.loss == "bradley_terry":
            margin = batch.margin.reshape(-1) if self.compare == "pairs" else None
            loss = bradley_terry_loss(chosen, rejected, margin=margin)
        sums = {"loss": loss, "accuracy": (chosen > rejected).astype(jnp.float32), "margin": chosen - rejected}
        return {name: masked_sum(value, real) for name, value in sums.items()} | {
            "count": jnp.sum(real).astype(jnp.float32)
        }


def pair_scores(network: SplitModel, params: SplitParams, batch: PairBatch | PackedPairs) -> tuple[Array, Array, Array]:
    """The scores of both answers of each pair.

    Args:
      network: a model with a scalar head.
      params: its parameters.
      batch: B pairs, or B rows of up to S packed pairs.

    Returns:
      (chosen, rejected, real), float32[N], float32[N] and bool[N], where N is B or B · S; `real` is False for padding.
    """
    if isinstance(batch, PackedPairs):
        values = _values(network, params, batch.tokens, batch.mask, positions=batch.positions, segments=batch.segments)
        chosen, rejected = (
            jnp.take_along_axis(values, last, axis=1).reshape(-1) for last in (batch.chosen_last, batch.rejected_last)
        )
        return chosen, rejected, jnp.asarray(batch.real).reshape(-1)
    tokens, mask = _stacked(batch)
    chosen, rejected = jnp.split(text_scores(network, params, tokens, mask), 2)
    return chosen, rejected, jnp.any(batch.chosen_mask, axis=1)


def _token_loss(network: SplitModel, params: SplitParams, batch: PairBatch) -> tuple[Array, Array, Array]:
    """(scores of the chosen answers, scores of the rejected ones, loss), float32[B] each."""
    tokens, mask = _stacked(batch)
    values = _values(network, params, tokens, mask)
    chosen, rejected = jnp.split(values, 2)
    loss = token_ranking_loss(chosen, rejected, batch.chosen, batch.rejected, batch.chosen_mask, batch.rejected_mask)
    last = jnp.max(jnp.where(mask, jnp.arange(mask.shape[1]), 0), axis=1)
    chosen, rejected = jnp.split(jnp.take_along_axis(values, last[:, None], axis=1)[:, 0], 2)
    return chosen, rejected, loss


def _stacked(batch: PairBatch) -> tuple[Array, Array]:
    """Tokens and mask of the chosen answers, then of the rejected ones, [2B, T]."""
    return jnp.concatenate([batch.chosen, batch.rejected]), jnp.concatenate([batch.chosen_mask, batch.rejected_mask])


def _values(network: SplitModel, params: SplitParams, tokens: AnyArray, mask: AnyArray, **packing: AnyArray) -> Array:
    """The head's value at each token, float32[B, T]."""
    activations = network.frozen_activations(SplitParams(params.frozen, {}), tokens, mask, **packing)
    hidden = network.hidden_states(params, tokens, mask, activations, **packing)
    return network.model.apply({"params": network.head_params(params)}, hidden, method="apply_head")


def reward_start(pretrained: Pretrained, num_layers: int | None, key: Array) -> Pretrained:
    """The model that reward training starts from: the lower layers of a model, with a scalar head.

    A model that already has a trained scalar head keeps it, in float32, and its biases, unless layers are removed.

    Args:
      pretrained: a model with either head.
      num_layers: the number of layers to keep, from the bottom; None = all.
      key: for a new head, which is normal with standard deviation 1/√(width + 1).

    Returns:
      The model. It shares the parameters that it keeps with `pretrained`; `new_head` tells whether its head is new.

    Raises:
      ValueError: `num_layers` is not between 1 and the model's number of layers.

    Source of the initialization: Stiennon et al. 2020, "Learning to summarize from human feedback", appendix B.1.
    """
    config = pretrained.model.config
    layers = config.num_layers if num_layers is None else num_layers
    if not 1 <= layers <= config.num_layers:
        raise ValueError(f"num_layers={num_layers} must lie between 1 and the model's {config.num_layers} layers.")
    config = config.replace(num_layers=layers, sliding_layers=config.sliding_layers and config.sliding_layers[:layers])
    params = {name: value for name, value in pretrained.params.items() if name not in ("lm_head", "scalar_head")}
    if layers < pretrained.model.config.num_layers:
        params["layers"] = jax.tree.map(lambda leaf: leaf[:layers], params["layers"])
    model = Decoder(config, head="scalar", scan_layers=pretrained.model.scan_layers)
    own = (
        "scalar_head" in pretrained.params and not pretrained.new_head and layers == pretrained.model.config.num_layers
    )
    if own:
        kernel = pretrained.params["scalar_head"]["kernel"].astype(jnp.float32)
    else:
        kernel = head_init(config.output_size)(key, (config.output_size, 1)).astype(jnp.float32)
    if config.layout is not None:
        kernel = jax.device_put(kernel, config.layout.sharding(("embed", None)))
    biases = (pretrained.reward_bias, pretrained.missing_eos_bias) if own else (0.0, 0.0)
    params["scalar_head"] = {"kernel": kernel}
    return Pretrained(model, params, pretrained.tokenizer, None, *biases, new_head=not own)
