"""Supervised fine-tuning: a language model learns the data's completions."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import numpy as np

from jax_rlhf.data import DataConfig, Example
from jax_rlhf.hub import Pretrained, decode, response_end_ids, tokenizer_of
from jax_rlhf.hub.config import ModelConfig
from jax_rlhf.hub.load_model import load_model, sampled_ids
from jax_rlhf.models import Decoder
from jax_rlhf.models.split import SplitModel
from jax_rlhf.optim.microbatches import plan_batch
from jax_rlhf.optim.supervised import TrainingSpec
from jax_rlhf.parallel import Layout, gather_to_host
from jax_rlhf.runtime.manifest import export_model
from jax_rlhf.runtime.phase import Phase
from jax_rlhf.runtime.run_logger import sample_row
from jax_rlhf.runtime.supervised_phase import SupervisedTraining, mean_losses, start, total_steps, train
from jax_rlhf.sampling import sample
from jax_rlhf.sft.config import SFTConfig
from jax_rlhf.sft.loss import SFTLoss


def run(
    phase: Phase,
    config: SFTConfig,
    *,
    model: ModelConfig,
    data: DataConfig,
    layout: Layout | None,
    seed: int,
    eos_ids: tuple[int, ...] | None = None,
) -> dict[str, float]:
    """The SFT phase: a checkpoint → <workdir>/sft/model. Continues from the phase's last checkpoint.

    Args:
      phase: its log and checkpoints.
      config: its settings.
      model: the checkpoint to start from.
      data: the data.
      layout: the mesh; None = one device.
      seed: the seed of the order of rows and of the samples.
      eos_ids: tokens that end a response; None = those of the tokenizer and of the checkpoint's generation_config.

    Returns:
      The results, also in <workdir>/sft/summary.json: held-out loss (nats per token) before and after.

    Raises:
      ValueError, FileNotFoundError, CheckpointError: a setting, the data or a checkpoint cannot be used.
      Stopped: the run was asked to stop. It can continue.
    """
    phase.logger.info(f"loading {model.path}")
    policy = load_model(model, "lm", layout)
    ends, vocab_size = response_end_ids(policy, eos_ids), policy.model.config.vocab_size
    datasets = phase.create_datasets(
        data, tokenizer_of(policy), seed=seed, eos_ids=ends, vocab_size=vocab_size, mesh=layout
    )
    steps = total_steps(config.steps, config.epochs, datasets)
    spec = training_spec(config, policy.model, datasets.batch_size, steps, trainable_layers=model.trainable_layers)
    training = start(phase, spec, policy, datasets, layout)
    policy = dataclasses.replace(policy, params={})  # frees the trainable parameters, which `start` has copied

    def trained() -> Pretrained:
        return dataclasses.replace(policy, params=spec.network.join(training.params))

    evaluate = functools.partial(_evaluate, training)
    if phase.step == 0:
        with phase.watchdog:
            evaluate(0)
    export = lambda: export_model(phase.folder / "model", trained())  # noqa: E731
    train(training, steps, evaluate=evaluate, eval_every=config.eval_every, export=export)
    if config.sample_rows and datasets.held_out:
        phase.stop.check()
        with phase.watchdog:
            _log_samples(phase, config, trained(), datasets.held_out[: config.sample_rows], ends, seed)
    return phase.finish({"steps": phase.step} | phase.notes)


def training_spec(
    config: SFTConfig, model: Decoder, batch_size: int, steps: int, *, trainable_layers: int | None
) -> TrainingSpec:
    """What the update is made of: model, loss, optimizer, microbatches.

    Args:
      config: the phase's settings.
      model: the policy.
      batch_size: rows per step.
      steps: steps of the phase, at whose end the learning rate's schedule ends.
      trainable_layers: how many layers train, counted from the top; None = all parameters.

    Raises:
      ValueError: the batch does not divide into the configured microbatches.
    """
    return TrainingSpec(
        network=SplitModel(model, trainable_layers),
        loss=SFTLoss(config.loss_on),
        optimizer=config.optimizer.with_end(steps),
        microbatches=microbatches(config, batch_size, model.config.layout),
    )


def microbatches(config: SFTConfig, batch_size: int, layout: Layout | None) -> int:
    """The number of microbatches per batch.

    Raises:
      ValueError: the batch does not divide into the configured microbatches.
    """
    rows_field = "config.data.sft_batch_size"
    return plan_batch(
        batch_size, config.microbatch_size, layout, where="config.sft", rows_field=rows_field
    ).microbatches


def _evaluate(training: SupervisedTraining, step: int) -> dict[str, float]:
    """Logs loss and perplexity on the held-out rows."""
    phase, means = training.phase, mean_losses(training)
    if not means:
        return {}
    means["perplexity"] = math.exp(min(means["loss"], 700.0))
    metrics = {f"eval/{name}": value for name, value in means.items()}
    phase.logger.log_metrics(step, metrics)
    phase.logger.info(
        f"step {step}: held-out loss {means['loss']:.3f} nats/token, perplexity {means['perplexity']:.1f}"
    )
    phase.notes.setdefault("eval/loss_before", means["loss"])
    phase.notes["eval/loss"] = means["loss"]
    return metrics


def _log_samples(
    phase: Phase, config: SFTConfig, policy: Pretrained, examples: Sequence[Example], ends: tuple[int, ...], seed: int
) -> None:
    """Logs the model's responses to held-out prompts, or to the first 8 tokens of texts without a prompt."""
    tokenizer, decoder = tokenizer_of(policy), policy.model.config
    rows = [example.prompt if example.has_prompt else _opening(example) for example in examples]
    max_new_tokens = config.sample_tokens
    if decoder.position_kind == "learned":  # a long prompt leaves room for fewer new tokens, or is cut
        max_new_tokens = max(1, min(max_new_tokens, decoder.max_positions - max(map(len, rows))))
        rows = [row[-(decoder.max_positions - max_new_tokens) :] for row in rows]
    width = max(map(len, rows))
    prompts, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)  # [B, P] each
    for index, row in enumerate(rows):
        prompts[index, width - len(row) :], mask[index, width - len(row) :] = row, True
    samples = sample(
        policy.model.clone(config=sampled_ids(decoder, tokenizer)),
        policy.params,
        prompts,
        mask,
        jax.random.key(seed),
        max_new_tokens=max_new_tokens,
        eos_id=ends,
    )
    answers, lines = (gather_to_host(samples.tokens), gather_to_host(samples.response_mask)), []
    for example, row, tokens, real in zip(examples, rows, *answers, strict=True):
        response = tokens[width:][real]
        facts = {"length": len(response), "ended": bool(np.isin(response, ends).any()), "columns": example.columns}
        lines.append(sample_row(phase.step, "eval", decode(tokenizer, row), decode(tokenizer, response), **facts))
    phase.logger.log_samples(lines)


def _opening(example: Example) -> np.ndarray:
    return np.concatenate([example.prompt, *example.completions])[:8]
