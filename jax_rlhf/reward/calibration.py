"""Normalises a reward model: its scores of the SFT policy's responses get mean 0 and deviation 1."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_rlhf.data import DataConfig, create_datasets
from jax_rlhf.hub import Pretrained, decode, tokenizer_of
from jax_rlhf.hub.config import ModelConfig
from jax_rlhf.hub.load_model import sampled_ids
from jax_rlhf.models import model_jit
from jax_rlhf.models.decoder import Params
from jax_rlhf.models.split import SplitModel, SplitParams, text_scores
from jax_rlhf.optim.microbatches import BatchPlan
from jax_rlhf.parallel import Layout, gather_rows, map_row_groups, put_rows
from jax_rlhf.runtime.run_logger import sample_row
from jax_rlhf.runtime.supervised_phase import SupervisedTraining
from jax_rlhf.sampling import Samples, Sampling, sample

_LEAST_RESPONSES = 8  # of each kind, to tell whether responses without EOS score higher


@dataclasses.dataclass(frozen=True, kw_only=True)
class Responses:
    """The SFT policy's responses to the PPO phase's prompts, sampled and scored as that phase will do it.

    Attributes:
      policy: the SFT policy.
      count: responses, rounded up to whole batches.
      sampling: how they are sampled.
      batch_plan: (rows, prompt tokens, mesh, platform) → how the PPO phase splits an iteration, which gives the rows
        that are scored at once.
      eval_rows: held-out rows of the PPO phase, whose prompts are not used here.
    """

    policy: ModelConfig
    count: int
    sampling: Sampling
    batch_plan: Callable[[int, int, Layout | None, str], BatchPlan]
    eval_rows: int


def policy_scores(
    training: SupervisedTraining,
    policy: Pretrained,
    responses: Responses,
    data: DataConfig,
    ends: tuple[int, ...],
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Samples and scores the responses, and logs them as samples.

    Args:
      training: the reward phase.
      policy: the model of `responses.policy`.
      responses: what to sample.
      data: the run's data.
      ends: ids of the tokens that end a response.
      seed: the seed of the prompts' order and of the samples.

    Returns:
      (scores float32[N], ended bool[N]: whether the response has its EOS).
    """
    phase, layout, network = training.phase, training.layout, training.spec.network
    prompts = create_datasets(data, tokenizer_of(policy), "ppo", seed=seed, eval_rows=responses.eval_rows, mesh=layout)
    common = sampled_ids(policy.model.config, policy.tokenizer, network.model.config.vocab_size)
    policy = dataclasses.replace(policy, model=policy.model.clone(config=common))
    scores, ended, lines = [], [], []
    for step in phase.logger.progress_bar(range(-(-responses.count // prompts.batch_size)), "scoring"):
        batch = prompts.train[step]
        rows = put_rows((batch.tokens, batch.mask, batch.row_ids), layout)
        samples = _sampled(policy, responses.sampling, rows, ends, jax.random.fold_in(jax.random.key(seed), step))
        width = batch.mask.shape[1]
        last = samples.response_mask & jnp.isin(samples.tokens[:, width:], jnp.asarray(ends, jnp.int32))  # [B, R]
        mask = jnp.concatenate([rows[1], samples.response_mask], axis=1)  # [B, P + R]
        plan = responses.batch_plan(len(mask), width, layout, policy.model.config.platform)
        groups = len(mask) // plan.microbatch_size
        found = batch_text_scores(network, groups, training.params, samples.tokens, mask)
        arrays = [gather_rows(part) for part in (samples.tokens, mask, found, jnp.any(last, axis=1))]
        scores.append(arrays[2])
        ended.append(arrays[3])
        columns = batch.columns if jax.process_count() == 1 else {}
        lines += _sample_rows(policy, phase.step, width, arrays, columns)
    phase.logger.log_samples(lines)
    return np.concatenate(scores), np.concatenate(ended)


def _sampled(
    policy: Pretrained, sampling: Sampling, prompts: tuple[Array, Array, Array], ends: tuple[int, ...], key: Array
) -> Samples:
    tokens, mask, row_ids = prompts
    return sample(
        policy.model,
        policy.params,
        tokens,
        mask,
        key,
        max_new_tokens=sampling.max_new_tokens,
        min_new_tokens=sampling.min_new_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        eos_id=ends,
        row_ids=row_ids,
    )


def _sample_rows(
    policy: Pretrained,
    step: int,
    width: int,
    arrays: Sequence[np.ndarray],
    columns: Mapping[str, Sequence[Any]],
) -> list[dict[str, Any]]:
    """Lines of samples.jsonl of arrays (tokens, mask, scores, ended), P = `width`."""
    tokenizer = tokenizer_of(policy)
    lines = []
    for index, (row, real, score, end) in enumerate(zip(*arrays, strict=True)):
        prompt, response = decode(tokenizer, row[:width][real[:width]]), decode(tokenizer, row[width:][real[width:]])
        facts = {"score": float(score), "length": int(real[width:].sum()), "ended": bool(end)}
        own = {name: values[index] for name, values in columns.items()}
        lines.append(sample_row(step, "train", prompt, response, columns=own, **facts))
    return lines


def calibration(scores: np.ndarray, ended: np.ndarray) -> dict[str, float]:
    """What brings the scores of SFT responses to mean 0 and deviation 1, without a bonus for not ending.

    A reward model that was trained on complete answers cannot judge those that were cut at max_new_tokens. If it
    scores them higher on average, PPO would learn never to end; that bonus is removed. A malus stays.

    Args:
      scores: float[N], the head's.
      ended: bool[N], whether with EOS.

    Returns:
      "gain", "bias" and "missing_eos_bias": score = gain · head + bias − missing_eos_bias · [not ended]. The last is 0
      if fewer than 8 responses ended, or fewer than 8 did not.
    """
    few = min(np.sum(ended), np.sum(~ended)) < _LEAST_RESPONSES
    gap = 0.0 if few else max(0.0, float(np.mean(scores[~ended]) - np.mean(scores[ended])))
    scores = scores - gap * ~ended
    gain = 1 / max(float(np.std(scores)), 1e-6)
    return {"gain": gain, "bias": -float(np.mean(scores)) * gain, "missing_eos_bias": gap * gain}


def calibrated(
    pretrained: Pretrained,
    params: Params,
    gain: float = 1.0,
    bias: float | None = None,
    missing_eos_bias: float | None = None,
) -> Pretrained:
    """A reward model whose score is gain · head + bias: the gain goes into the head, the biases into config.json.

    Args:
      pretrained: the model that the phase started from.
      params: the whole model's parameters.
      gain: factor on the scalar head.
      bias, missing_eos_bias: in units of the new score; None = those of `pretrained`.
    """
    head = jax.tree.map(lambda leaf: leaf * gain, params["scalar_head"])
    biases = {"reward_bias": bias, "missing_eos_bias": missing_eos_bias}
    given = {name: value for name, value in biases.items() if value is not None}
    return dataclasses.replace(pretrained, params=params | {"scalar_head": head}, new_head=False, **given)


@functools.partial(model_jit, static_argnums=(0, 1))
def batch_text_scores(network: SplitModel, groups: int, params: SplitParams, tokens: Array, mask: Array) -> Array:
    """Scores of a batch of texts.

    Args:
      network: the reward model.
      groups: microbatches, one after the other.
      params: its parameters.
      tokens: int[B, T].
      mask: bool[B, T].

    Returns:
      float32[B].
    """
    scores = lambda rows: text_scores(network, params, *rows)  # noqa: E731
    return map_row_groups(scores, (tokens, mask), groups, network.model.config.layout)
