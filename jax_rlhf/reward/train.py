"""The reward model: it learns which of two answers people prefer."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_rlhf.cli.model_paths import sft_model
from jax_rlhf.config import RunConfig
from jax_rlhf.data import Datasets, PackedPairs, PairBatch, create_datasets
from jax_rlhf.hub import Pretrained, describe_pretrained
from jax_rlhf.hub.model_config import load_model, sampled_ids
from jax_rlhf.models import Decoder, model_jit
from jax_rlhf.models.split import SplitModel, SplitParams, text_scores
from jax_rlhf.optim.microbatches import plan_batch
from jax_rlhf.optim.supervised import Supervised
from jax_rlhf.parallel import Layout, check_same_on_all_processes, create_layout, map_row_groups, put_rows
from jax_rlhf.reward.config import RewardConfig
from jax_rlhf.reward.loss import RewardLoss, pair_scores, reward_start
from jax_rlhf.runtime.manifest import export_model
from jax_rlhf.runtime.preemption import StopSignals
from jax_rlhf.runtime.run_logger import Record, sample_row
from jax_rlhf.runtime.supervised_phase import begun, total_steps, train
from jax_rlhf.sampling import sample


def run(
    config: RunConfig, workdir: Path, *, stop: StopSignals | None = None, accept_changes: bool = False
) -> dict[str, float]:
    """The reward phase: config.reward.start_from, or the SFT policy → <workdir>/reward/model.

    Args:
      config: the run's settings.
      workdir: its folder.
      stop, accept_changes: as in the SFT phase.

    Returns:
      What it came to, also in <workdir>/reward/summary.json: accuracy on held-out pairs, AUC over all of them.

    Raises:
      ValueError, FileNotFoundError, CheckpointError: a setting, the data or a checkpoint cannot be used.
      Stopped: it was asked to stop, and can go on.
    """
    settings, folder = config.reward, workdir / "reward"
    layout = create_layout(config.mesh, config.rollout_mesh)
    path = settings.start_from or sft_model(config, workdir)
    policy_path = sft_model(config, workdir) if settings.normalize_rows else None
    with Record(folder, config.log, stop, settings=config) as record:
        record.say(f"loading {path}")
        pretrained = _start(config, path, layout)
        if pretrained.new_head:
            record.say("its scalar head is new, and random")
        else:
            record.say("it is a reward model already: training goes on with its own scalar head")
        # What it will score is written with the policy's chat template, and ends as the policy's answers do.
        policy = describe_pretrained(config.model.path, revision=config.model.revision)
        pretrained = dataclasses.replace(pretrained, tokenizer=policy.tokenizer)
        data, ends = config.data_of("reward"), config.ends(policy)
        how = {"seed": config.seed, "eos_ids": ends, "vocab_size": pretrained.model.config.vocab_size}
        datasets = create_datasets(data, policy.tokenizer, "reward", mesh=layout, **how)
        check_same_on_all_processes(datasets.digest, "the data")
        record.says_of(datasets)
        steps = total_steps(settings.steps, settings.epochs, datasets)
        how = how_to_train(settings, pretrained.model, datasets.batch_size, steps)
        progress, frozen = begun(record, config, how, pretrained, datasets, layout, accept_changes=accept_changes)
        pretrained = dataclasses.replace(pretrained, params={})  # those that train have been copied

        def params() -> SplitParams:
            return SplitParams(frozen, progress.state.trainable)

        def save(**calibration: float) -> None:
            export_model(folder / "model", _calibrated(how.network, params(), pretrained, **calibration))

        def report(step: int) -> dict[str, float]:
            held_out = _held_out(how, params(), datasets, record, layout)
            if held_out:
                record.metrics(step, held_out)
                record.say(
                    f"step {step}: held-out pairs {held_out['eval/accuracy']:.1%} right, AUC {held_out['eval/auc']:.3f}"
                )
                progress.notes.update(held_out)
            return held_out

        how_often = {"evaluate": report, "eval_every": settings.eval_every}
        train(config, how, progress, frozen, datasets, steps, record, layout, **how_often, export=save)
        result = {"steps": progress.step} | progress.notes
        if policy_path is not None:
            record.stop.check()
            record.say(f"scoring {settings.normalize_rows} responses of the SFT policy, to normalise scores")
            policy = load_model(dataclasses.replace(config.model, path=policy_path), "lm", layout)
            trained = how.network, params(), progress.step
            with progress.watchdog:
                scores, ended, rows = _policy_scores(config, policy, ends, *trained, layout, record)
            record.samples(rows)
            found = calibration(scores, ended)
            result |= found
            save(**found)
        record.summary(result | progress.costs.summary())
    return result


def _start(config: RunConfig, path: str, layout: Layout | None) -> Pretrained:
    """The model that becomes a reward model: with its own scalar head, or a new random one."""
    settings, key = config.reward, jax.random.key(config.seed)
    start = dataclasses.replace(config.model, path=path, revision=settings.start_revision)
    return reward_start(load_model(start, "scalar", layout, key=key), settings.num_layers, key)


def how_to_train(settings: RewardConfig, model: Decoder, batch_size: int, steps: int) -> Supervised:
    """The update as the settings want it.

    Args:
      settings: the phase's.
      model: the reward model.
      batch_size: pairs, or packs.
      steps: of the phase, at whose end the schedule ends.

    Returns:
      What and how.

    Raises:
      ValueError: a batch that cannot be cut as configured.
    """
    plan = plan_batch(batch_size, settings.microbatch_size, model.config.layout, where="config.reward")
    how = Supervised(
        network=SplitModel(model, settings.trainable_layers),
        loss=RewardLoss(settings.loss, settings.compare),
        optimizer=settings.optimizer.with_end(steps),
        head_learning_rate=settings.head_learning_rate,
        microbatches=plan.microbatches,
    )
    if settings.compare == "all" and how.microbatches > 1:
        raise ValueError('config.reward.compare="all" compares within a whole batch: no microbatch_size.')
    return how


def _held_out(
    how: Supervised, params: SplitParams, datasets: Datasets, record: Record, layout: Layout | None
) -> dict[str, float]:
    """Accuracy on pairs, AUC over all chosen × rejected, and what the scores look like."""
    if not datasets.eval:
        return {}
    batches = record.watched(datasets.eval, "evaluating")
    pairs = [batch_pair_scores(how.network, how.microbatches, params, put_rows(batch, layout)) for batch in batches]
    chosen, rejected, real = (np.concatenate([_everywhere(pair[part]) for pair in pairs]) for part in range(3))
    chosen, rejected = chosen[real], rejected[real]
    difference = chosen[:, None] - rejected[None]
    both = np.concatenate([chosen, rejected])
    return {
        "eval/accuracy": float(np.mean(chosen > rejected)),
        "eval/auc": float(np.mean(difference > 0) + 0.5 * np.mean(difference == 0)),
        "eval/margin": float(np.mean(chosen - rejected)),
        "eval/score_mean": float(np.mean(both)),
        "eval/score_std": float(np.std(both)),
    }


def _policy_scores(
    config: RunConfig,
    policy: Pretrained,
    ends: tuple[int, ...],
    network: SplitModel,
    params: SplitParams,
    trained_steps: int,
    layout: Layout | None,
    record: Record,
) -> tuple[np.ndarray, np.ndarray, list[Mapping[str, Any]]]:
    """The reward model's scores of the SFT policy's responses to the PPO phase's prompts, and which of them ended."""
    most = config.eval_rows_of("ppo")
    prompts = create_datasets(config.data, policy.tokenizer, "ppo", seed=config.seed, eval_rows=most, mesh=layout)
    ppo, known = config.ppo, network.model.config.vocab_size
    answering = policy.model.clone(config=sampled_ids(policy.model.config, policy.tokenizer, known))  # ids of both
    decode = functools.partial(policy.tokenizer.decode, skip_special_tokens=True)
    scores, ended, rows = [], [], []
    for step in record.watched(range(-(-config.reward.normalize_rows // prompts.batch_size)), "scoring"):
        batch = prompts.train[step]
        tokens, mask, row_ids = put_rows((batch.tokens, batch.mask, batch.row_ids), layout)
        samples = sample(
            answering,
            policy.params,
            tokens,
            mask,
            jax.random.fold_in(jax.random.key(config.seed), step),
            max_new_tokens=ppo.sampling.max_new_tokens,
            min_new_tokens=ppo.sampling.min_new_tokens,
            temperature=ppo.sampling.temperature,
            top_k=ppo.sampling.top_k,
            top_p=ppo.sampling.top_p,
            eos_id=ends,
            row_ids=row_ids,
        )
        last = samples.response_mask & jnp.isin(samples.tokens[:, mask.shape[1] :], jnp.asarray(ends, jnp.int32))
        mask = jnp.concatenate([mask, samples.response_mask], axis=1)
        platform = policy.model.config.platform
        groups = len(mask) // ppo.batch_plan(len(mask), batch.mask.shape[1], layout, platform).microbatch_size
        found = batch_text_scores(network, groups, params, samples.tokens, mask)
        batch = [_everywhere(part) for part in (samples.tokens, mask, found, jnp.any(last, axis=1))]
        scores.append(batch[2])
        ended.append(batch[3])
        width, names = tokens.shape[1], prompts.train[step].columns.items() if jax.process_count() == 1 else ()
        for index, (row, real, score, end) in enumerate(zip(*batch, strict=True)):
            texts = (decode(row[part][real[part]]) for part in (slice(0, width), slice(width, None)))
            how = {"score": float(score), "length": int(real[width:].sum()), "ended": bool(end)}
            own = {name: values[index] for name, values in names}
            rows.append(sample_row(trained_steps, "train", *texts, columns=own, **how))
    return np.concatenate(scores), np.concatenate(ended), rows


def calibration(scores: np.ndarray, ended: np.ndarray) -> dict[str, float]:
    """What brings the scores of SFT responses to mean 0 and deviation 1, without a bonus for not ending.

    A reward model that was trained on whole answers has no ground for what it says of those that were cut at
    max_new_tokens. Where it says more, on average, PPO would learn never to end; where it says less, that stands.

    Args:
      scores: float[N], the head's.
      ended: bool[N], whether with EOS.

    Returns:
      "gain", "bias" and "missing_eos_bias": score = gain · head + bias − missing_eos_bias · [not ended]. The last is 0
      where fewer than 8 responses ended, or did not.
    """
    few = min(np.sum(ended), np.sum(~ended)) < 8
    gap = 0.0 if few else max(0.0, float(np.mean(scores[~ended]) - np.mean(scores[ended])))
    scores = scores - gap * ~ended
    gain = 1 / max(float(np.std(scores)), 1e-6)
    return {"gain": gain, "bias": -float(np.mean(scores)) * gain, "missing_eos_bias": gap * gain}


@functools.partial(model_jit, static_argnums=(0, 1))
def batch_pair_scores(
    network: SplitModel, groups: int, params: SplitParams, batch: PairBatch | PackedPairs
) -> tuple[Array, Array, Array]:
    """Scores of a batch of pairs.

    Args:
      network: the reward model.
      groups: microbatches, one after the other.
      params: its parameters.
      batch: pairs, or packs of them.

    Returns:
      (chosen, rejected, real), as `pair_scores` has them.
    """
    scores = functools.partial(pair_scores, network, params)
    return map_row_groups(scores, batch, groups, network.model.config.layout)


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


def _everywhere(array: Array) -> np.ndarray:
    """All processes' rows."""
    from jax.experimental import multihost_utils

    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _calibrated(
    network: SplitModel,
    params: SplitParams,
    pretrained: Pretrained,
    gain: float = 1.0,
    bias: float | None = None,
    missing_eos_bias: float | None = None,
) -> Pretrained:
    """score = gain · head + bias: the gain goes into the head, biases into config.json. None = as it started with."""
    whole = network.join(params)
    head = jax.tree.map(lambda leaf: leaf * gain, whole["scalar_head"])
    biases = {"reward_bias": bias, "missing_eos_bias": missing_eos_bias}
    known = {name: value for name, value in biases.items() if value is not None}
    return dataclasses.replace(pretrained, params=whole | {"scalar_head": head}, new_head=False, **known)
