"""The loss of supervised fine-tuning."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from jax_rlhf.data import TextBatch
from jax_rlhf.models.split import SplitModel, SplitParams
from jax_rlhf.optim.supervised import Sums
from jax_rlhf.rl import masked_sum
from jax_rlhf.sampling import score_hidden


@dataclasses.dataclass(frozen=True)
class SFTLoss:
    """Σ −log π(token | the tokens of its text before it), in nats.

    Attributes:
      loss_on: "completion", whose tokens (EOS included) are in the loss, or "all", including the prompt. A text's
        first token is never counted, since no token precedes it.

    Source: Ouyang et al. 2022, section 3.5.
    """

    loss_on: Literal["completion", "all"] = "completion"

    def __call__(self, network: SplitModel, params: SplitParams, batch: TextBatch) -> Sums:
        """The loss and metrics, summed over a batch.

        Returns:
          Sums, float32[] each: "loss" in nats, "entropy" in nats, "count" of tokens.
        """
        packing = {"positions": batch.positions, "segments": batch.segments}
        frozen = jax.lax.stop_gradient(params.frozen)
        activations = network.frozen_activations(SplitParams(frozen, {}), batch.tokens, batch.mask, **packing)
        hidden = network.hidden_states(params, batch.tokens, batch.mask, activations, **packing)[:, :-1]
        logprobs, entropy = score_hidden(network.model, network.head_params(params), hidden, batch.tokens[:, 1:])
        counted = batch.mask[:, 1:] & (batch.positions[:, 1:] > 0)
        if self.loss_on == "completion":
            counted = counted & batch.completion_mask[:, 1:]
        return {
            "loss": -masked_sum(logprobs, counted),
            "entropy": jax.lax.stop_gradient(masked_sum(entropy, counted)),
            "count": jnp.sum(counted).astype(jnp.float32),
        }
