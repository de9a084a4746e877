"""Supervised fine-tuning: a language model learns the data's completions."""

import dataclasses
import functools
import math
from pathlib import Path

import jax
import numpy as np

from jax_rlhf.config import RunConfig
from jax_rlhf.data import Datasets, Example, create_datasets
from jax_rlhf.hub import Pretrained
from jax_rlhf.hub.model_config import load_model, sampled_ids
from jax_rlhf.models import Decoder
from jax_rlhf.models.split import SplitModel, SplitParams
from jax_rlhf.optim.microbatches import plan_batch
from jax_rlhf.optim.supervised import Supervised
from jax_rlhf.parallel import check_same_on_all_processes, create_layout, gather_to_host
from jax_rlhf.runtime.manifest import export_model
from jax_rlhf.runtime.preemption import StopSignals
from jax_rlhf.runtime.run_logger import Record, sample_row
from jax_rlhf.runtime.supervised_phase import begun, evaluated, total_steps, train
from jax_rlhf.sampling import sample
from jax_rlhf.sft.loss import SFTLoss


def run(
    config: RunConfig, workdir: Path, *, stop: StopSignals | None = None, accept_changes: bool = False
) -> dict[str, float]:
    """The SFT phase: config.model → <workdir>/sft/model. Goes on from its last checkpoint, where there is one.

    Args:
      config: the run's settings.
      workdir: its folder.
      stop: the run's; None = Ctrl-C and SIGTERM are listened for here.
      accept_changes: go on although data, tokenizer or frozen parameters are not those that the phase began with.

    Returns:
      What it came to, also in <workdir>/sft/summary.json: held-out loss (nats per token) before and after.

    Raises:
      ValueError, FileNotFoundError, CheckpointError: a setting, the data or a checkpoint cannot be used.
      Stopped: it was asked to stop, and can go on.
    """
    settings, folder = config.sft, workdir / "sft"
    layout = create_layout(config.mesh, config.rollout_mesh)
    with Record(folder, config.log, stop, settings=config) as record:
        record.say(f"loading {config.model.path}")
        pretrained = load_model(config.model, "lm", layout)
        ends = config.ends(pretrained)
        how = {"seed": config.seed, "eos_ids": ends, "vocab_size": pretrained.model.config.vocab_size}
        datasets = create_datasets(config.data, pretrained.tokenizer, "sft", mesh=layout, **how)
        check_same_on_all_processes(datasets.digest, "the data")
        record.says_of(datasets)
        steps = total_steps(settings.steps, settings.epochs, datasets)
        how = how_to_train(config, pretrained.model, datasets.batch_size, steps)
        progress, frozen = begun(record, config, how, pretrained, datasets, layout, accept_changes=accept_changes)
        pretrained = dataclasses.replace(pretrained, params={})  # those that train have been copied

        def trained() -> Pretrained:
            params = how.network.join(SplitParams(frozen, progress.state.trainable))
            return dataclasses.replace(pretrained, params=params)

        def report(step: int) -> dict[str, float]:
            held_out = evaluated(how, progress.state, frozen, datasets, record, layout)
            if not held_out:
                return {}
            held_out["perplexity"] = math.exp(min(held_out["loss"], 700.0))
            metrics = {f"eval/{name}": value for name, value in held_out.items()}
            record.metrics(step, metrics)
            record.say(
                f"step {step}: held-out loss {held_out['loss']:.3f} nats/token, perplexity {held_out['perplexity']:.1f}"
            )
            progress.notes.setdefault("eval/loss_before", held_out["loss"])
            progress.notes["eval/loss"] = held_out["loss"]
            return metrics

        if progress.step == 0:
            with progress.watchdog:
                report(0)

        def save() -> None:
            export_model(folder / "model", trained())

        how_often = {"evaluate": report, "eval_every": settings.eval_every}
        train(config, how, progress, frozen, datasets, steps, record, layout, **how_often, export=save)
        if settings.sample_rows and datasets.held_out:
            record.stop.check()
            with progress.watchdog:
                _write_samples(config, trained(), datasets, progress.step, record)
        result = {"steps": progress.step} | progress.notes
        record.summary(result | progress.costs.summary())
    return result


def how_to_train(config: RunConfig, model: Decoder, batch_size: int, steps: int) -> Supervised:
    """The update as the settings want it.

    Args:
      config: the run's.
      model: the policy.
      batch_size: rows.
      steps: of the phase, at whose end the schedule ends.

    Returns:
      What and how.

    Raises:
      ValueError: a batch that cannot be cut as configured.
    """
    settings = config.sft
    plan = plan_batch(batch_size, settings.microbatch_size, model.config.layout, where="config.sft")
    return Supervised(
        network=SplitModel(model, config.model.trainable_layers),
        loss=SFTLoss(settings.loss_on),
        optimizer=settings.optimizer.with_end(steps),
        microbatches=plan.microbatches,
    )


def _write_samples(config: RunConfig, pretrained: Pretrained, datasets: Datasets, steps: int, record: Record) -> None:
    """The model's answers to held-out prompts (to the first 8 tokens of texts without a prompt)."""
    tokenizer, examples = pretrained.tokenizer, datasets.held_out[: config.sft.sample_rows]
    rows = [example.prompt if example.has_prompt else _opening(example) for example in examples]
    most, decoder = config.sft.sample_tokens, pretrained.model.config
    if decoder.position_kind == "learned":  # a long prompt leaves less to answer, or is cut
        most = max(1, min(most, decoder.max_positions - max(map(len, rows))))
        rows = [row[-(decoder.max_positions - most) :] for row in rows]
    width = max(map(len, rows))
    prompts, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
    for index, row in enumerate(rows):
        prompts[index, width - len(row) :], mask[index, width - len(row) :] = row, True
    ends = config.ends(pretrained)
    samples = sample(
        pretrained.model.clone(config=sampled_ids(pretrained.model.config, tokenizer)),
        pretrained.params,
        prompts,
        mask,
        jax.random.key(config.seed),
        max_new_tokens=most,
        eos_id=ends,
    )
    decode = functools.partial(tokenizer.decode, skip_special_tokens=True)
    answers, written = (gather_to_host(samples.tokens), gather_to_host(samples.response_mask)), []
    for example, row, tokens, real in zip(examples, rows, *answers, strict=True):
        response = tokens[width:][real]
        how = {"length": len(response), "ended": bool(np.isin(response, ends).any()), "columns": example.columns}
        written.append(sample_row(steps, "eval", decode(row), decode(response), **how))
    record.samples(written)


def _opening(example: Example) -> np.ndarray:
    return np.concatenate([example.prompt, *example.completions])[:8]
