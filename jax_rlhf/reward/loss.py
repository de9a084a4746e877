"""The losses of a reward model, and the cut of a language model that it starts as."""

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
    """How a reward model learns from pairs.

    Attributes:
      loss: "bradley_terry", on scores at the last tokens; "token": DeepSpeed-Chat's, on all from where the two differ.
      compare: "pairs": each chosen with its own rejected; "all": each chosen with every rejected of the batch, for data
        whose pairs are arbitrary, such as texts with labels.
    """

    loss: Literal["bradley_terry", "token"] = "bradley_terry"
    compare: Literal["pairs", "all"] = "pairs"

    def __call__(self, network: SplitModel, params: SplitParams, batch: PairBatch | PackedPairs) -> Sums:
        """Sums over a batch.

        Args:
          network: with a scalar head.
          params: its parameters.
          batch: B pairs, or rows of packed ones, which the token loss does not take.

        Returns:
          "loss" in nats, "accuracy" (chosen above rejected), "margin" (chosen − rejected), "count" of comparisons;
          float32[] each.
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
      network: with a scalar head.
      params: its parameters.
      batch: B pairs, or B rows of up to S packed ones.

    Returns:
      (chosen, rejected, real), float32[N], float32[N] and bool[N]: N is B, or B · S; what is not real is no pair.
    """
    if isinstance(batch, PackedPairs):
        values = _values(network, params, batch.tokens, batch.mask, positions=batch.positions, segments=batch.segments)
        chosen, rejected = (
            jnp.take_along_axis(values, last, axis=1).reshape(-1) for last in (batch.chosen_last, batch.rejected_last)
        )
        return chosen, rejected, jnp.asarray(batch.real).reshape(-1)
    tokens, mask = _both(batch)
    chosen, rejected = jnp.split(text_scores(network, params, tokens, mask), 2)
    return chosen, rejected, jnp.any(batch.chosen_mask, axis=1)


def _token_loss(network: SplitModel, params: SplitParams, batch: PairBatch) -> tuple[Array, Array, Array]:
    """(scores of the chosen, of the rejected, loss), float32[B] each."""
    tokens, mask = _both(batch)
    values = _values(network, params, tokens, mask)
    chosen, rejected = jnp.split(values, 2)
    loss = token_ranking_loss(chosen, rejected, batch.chosen, batch.rejected, batch.chosen_mask, batch.rejected_mask)
    last = jnp.max(jnp.where(mask, jnp.arange(mask.shape[1]), 0), axis=1)
    chosen, rejected = jnp.split(jnp.take_along_axis(values, last[:, None], axis=1)[:, 0], 2)
    return chosen, rejected, loss


def _both(batch: PairBatch) -> tuple[Array, Array]:
    """Tokens and mask of chosen above rejected, [2B, T]."""
    return jnp.concatenate([batch.chosen, batch.rejected]), jnp.concatenate([batch.chosen_mask, batch.rejected_mask])


def _values(network: SplitModel, params: SplitParams, tokens: AnyArray, mask: AnyArray, **apart: AnyArray) -> Array:
    """The head's value at each token, float32[B, T]."""
    activations = network.frozen_activations(SplitParams(params.frozen, {}), tokens, mask, **apart)
    hidden = network.hidden_states(params, tokens, mask, activations, **apart)
    return network.model.apply({"params": network.head_params(params)}, hidden, method="apply_head")


def reward_start(pretrained: Pretrained, num_layers: int | None, key: Array) -> Pretrained:
    """The model that a reward model starts as: the lower layers of a model, and a scalar head.

    A reward model keeps the head that it was loaded with, in float32, and its biases, unless layers below it go.

    Args:
      pretrained: a model with either head.
      num_layers: how many layers to keep, from the bottom; None = all.
      key: of a new head, normal with standard deviation 1/√(width + 1).

    Returns:
      The model, `new_head` where its head is new; parameters that stay are shared.

    Raises:
      ValueError: more layers than there are.

    Source: the head: Stiennon et al. 2020, "Learning to summarize from human feedback", appendix B.1.
    """
    config = pretrained.model.config
    layers = config.num_layers if num_layers is None else num_layers
    if not 1 <= layers <= config.num_layers:
        raise ValueError(f"num_layers={num_layers} must lie within 1 and the model's {config.num_layers} layers.")
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
