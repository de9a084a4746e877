"""The reward phase: a model learns which of two responses people prefer."""

import dataclasses
import functools

import jax
import numpy as np
from jax import Array

from jax_rlhf.data import DataConfig, PackedPairs, PairBatch
from jax_rlhf.hub import Pretrained, describe_pretrained, response_end_ids, tokenizer_of
from jax_rlhf.hub.config import ModelConfig
from jax_rlhf.hub.load_model import load_model
from jax_rlhf.models import Decoder, model_jit
from jax_rlhf.models.split import SplitModel, SplitParams
from jax_rlhf.optim.microbatches import plan_batch
from jax_rlhf.optim.supervised import TrainingSpec
from jax_rlhf.parallel import Layout, gather_rows, map_row_groups, put_rows
from jax_rlhf.reward.calibration import Responses, calibrated, calibration, policy_scores
from jax_rlhf.reward.config import RewardConfig
from jax_rlhf.reward.loss import RewardLoss, pair_scores, reward_start
from jax_rlhf.runtime.manifest import export_model
from jax_rlhf.runtime.phase import Phase
from jax_rlhf.runtime.supervised_phase import SupervisedTraining, start, total_steps, train


def run(
    phase: Phase,
    config: RewardConfig,
    *,
    model: ModelConfig,
    policy: ModelConfig,
    responses: Responses | None,
    data: DataConfig,
    layout: Layout | None,
    seed: int,
    eos_ids: tuple[int, ...] | None = None,
) -> dict[str, float]:
    """The reward phase: a checkpoint → <workdir>/reward/model. Continues from the phase's last checkpoint.

    Args:
      phase: its log and checkpoints.
      config: its settings.
      model: the checkpoint to start from, a language model or a reward model.
      policy: the policy's checkpoint, whose tokenizer and chat template the texts are written with.
      responses: the responses on which scores are normalised; None = scores are not normalised.
      data: the data.
      layout: the mesh; None = one device.
      seed: the seed of a new scalar head, the order of rows and the responses.
      eos_ids: tokens that end a response; None = those of the tokenizer and of the checkpoint's generation_config.

    Returns:
      The results, also in <workdir>/reward/summary.json: accuracy on held-out pairs, and AUC over all of them.

    Raises:
      ValueError, FileNotFoundError, CheckpointError: a setting, the data or a checkpoint cannot be used.
      Stopped: the run was asked to stop. It can continue.
    """
    phase.logger.info(f"loading {model.path}")
    pretrained = _load(phase, config, model, layout, seed)
    described = describe_pretrained(policy.required_path(), revision=policy.revision)
    pretrained = dataclasses.replace(pretrained, tokenizer=described.tokenizer)
    ends, vocab_size = response_end_ids(described, eos_ids), pretrained.model.config.vocab_size
    datasets = phase.create_datasets(
        data, tokenizer_of(described), seed=seed, eos_ids=ends, vocab_size=vocab_size, mesh=layout
    )
    steps = total_steps(config.steps, config.epochs, datasets)
    spec = training_spec(config, pretrained.model, datasets.batch_size, steps)
    training = start(phase, spec, pretrained, datasets, layout)
    pretrained = dataclasses.replace(pretrained, params={})  # frees the trainable ones, which `start` has copied

    def save(**values: float) -> None:
        export_model(phase.folder / "model", calibrated(pretrained, spec.network.join(training.params), **values))

    evaluate = functools.partial(_evaluate, training)
    train(training, steps, evaluate=evaluate, eval_every=config.eval_every, export=save)
    result = {"steps": phase.step} | phase.notes
    if responses is not None:
        phase.stop.check()
        phase.logger.info(f"scoring {responses.count} responses of the SFT policy, to normalise scores")
        sampler = load_model(responses.policy, "lm", layout)
        with phase.watchdog:
            found = calibration(*policy_scores(training, sampler, responses, data, ends, seed))
        save(**found)
        result |= found
    return phase.finish(result)


def _load(phase: Phase, config: RewardConfig, model: ModelConfig, layout: Layout | None, seed: int) -> Pretrained:
    """The model to train: with its own scalar head if it has one, or else with a new random one."""
    key = jax.random.key(seed)
    pretrained = reward_start(load_model(model, "scalar", layout, key=key), config.num_layers, key)
    if pretrained.new_head:
        phase.logger.info("its scalar head is new, and random")
    else:
        phase.logger.info("it is a reward model already: training continues with its own scalar head")
    return pretrained


def training_spec(config: RewardConfig, model: Decoder, batch_size: int, steps: int) -> TrainingSpec:
    """What the update is made of: model, loss, optimizer, microbatches.

    Args:
      config: the phase's settings.
      model: the reward model.
      batch_size: pairs, or packs of pairs, per step.
      steps: steps of the phase, at whose end the learning rate's schedule ends.

    Raises:
      ValueError: the batch does not divide into the configured microbatches.
    """
    return TrainingSpec(
        network=SplitModel(model, config.trainable_layers),
        loss=RewardLoss(config.loss, config.compare),
        optimizer=config.optimizer.with_end(steps),
        head_learning_rate=config.head_learning_rate,
        microbatches=microbatches(config, batch_size, model.config.layout),
    )


def microbatches(config: RewardConfig, batch_size: int, layout: Layout | None) -> int:
    """The number of microbatches per batch.

    Raises:
      ValueError: the batch does not divide into the configured microbatches, or must be compared as a whole.
    """
    rows_field = "config.data.reward_batch_size"
    plan = plan_batch(batch_size, config.microbatch_size, layout, where="config.reward", rows_field=rows_field)
    if config.compare == "all" and plan.microbatches > 1:
        raise ValueError(
            'config.reward.compare="all" compares all answers of a batch: leave config.reward.microbatch_size unset.'
        )
    return plan.microbatches


def _evaluate(training: SupervisedTraining, step: int) -> dict[str, float]:
    """Logs accuracy on held-out pairs, AUC over all chosen × rejected, and the distribution of scores."""
    phase, spec = training.phase, training.spec
    if not training.datasets.eval:
        return {}
    batches = phase.logger.progress_bar(training.datasets.eval, "evaluating")
    rows = (put_rows(batch, training.layout) for batch in batches)
    pairs = [batch_pair_scores(spec.network, spec.microbatches, training.params, batch) for batch in rows]
    chosen, rejected, real = (np.concatenate([gather_rows(pair[part]) for pair in pairs]) for part in range(3))
    metrics = pair_metrics(chosen[real], rejected[real])
    phase.logger.log_metrics(step, metrics)
    phase.logger.info(
        f"step {step}: held-out pairs {metrics['eval/accuracy']:.1%} right, AUC {metrics['eval/auc']:.3f}"
    )
    phase.notes.update(metrics)
    return metrics


def pair_metrics(chosen: np.ndarray, rejected: np.ndarray) -> dict[str, float]:
    """Metrics of held-out pairs.

    Args:
      chosen, rejected: float[N], scores.

    Returns:
      Accuracy, AUC (over all N² combinations; a tie counts half), mean margin, mean and deviation of all scores.
    """
    difference = chosen[:, None] - rejected[None]
    scores = np.concatenate([chosen, rejected])
    return {
        "eval/accuracy": float(np.mean(chosen > rejected)),
        "eval/auc": float(np.mean(difference > 0) + 0.5 * np.mean(difference == 0)),
        "eval/margin": float(np.mean(chosen - rejected)),
        "eval/score_mean": float(np.mean(scores)),
        "eval/score_std": float(np.std(scores)),
    }


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
      (chosen, rejected, real), as `pair_scores` returns them.
    """
    scores = functools.partial(pair_scores, network, params)
    return map_row_groups(scores, batch, groups, network.model.config.layout)
