"""Code that the SFT and the reward phase share: the training loop, and the loss on held-out rows."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jax_rlhf.data import Datasets
from jax_rlhf.hub import Pretrained, tokenizer_of
from jax_rlhf.models.decoder import Params
from jax_rlhf.models.split import SplitParams
from jax_rlhf.optim.supervised import SupervisedState, TrainingSpec, create_state, evaluate, update
from jax_rlhf.parallel import Layout, put_rows
from jax_rlhf.runtime.numerics import check_step, debugged
from jax_rlhf.runtime.phase import Phase, digest, tokenizer_digest


@dataclasses.dataclass(frozen=True)
class SupervisedTraining:
    """A supervised phase that has been started.

    Attributes:
      phase: its log and checkpoints; `phase.state` is a `SupervisedState`.
      spec: model, loss and optimizer.
      frozen: the parameters that do not train.
      datasets: its data.
      layout: the mesh; None = one device.
    """

    phase: Phase
    spec: TrainingSpec
    frozen: Params
    datasets: Datasets
    layout: Layout | None

    @property
    def params(self) -> SplitParams:
        """The model's parameters after the last step."""
        return SplitParams(self.frozen, self.phase.state.trainable)


def total_steps(steps: int | None, epochs: float, datasets: Datasets) -> int:
    """Optimizer steps of a phase, 1 or more: `steps`, or `epochs` passes over the data if `steps` is None."""
    return max(1, round(epochs * datasets.steps_per_epoch)) if steps is None else steps


def other_widths(datasets: Datasets) -> str:
    """The end of a log line that names the widths of batches; empty if all batches have the same width."""
    if len(datasets.widths) == 1:
        return ""
    widths = ", ".join(map(str, datasets.widths))
    return f"; batches may be {widths} tokens wide, and XLA compiles once per width"


def start(
    phase: Phase, spec: TrainingSpec, pretrained: Pretrained, datasets: Datasets, layout: Layout | None
) -> SupervisedTraining:
    """Creates the training state, or restores it from the phase's last checkpoint.

    Args:
      phase: the phase.
      spec: model, loss and optimizer.
      pretrained: the model to start from. Its trainable parameters are copied.
      datasets: the data.
      layout: the mesh; None = one device.

    Raises:
      RestoreError: the checkpoint cannot be used, or the data, the tokenizer or the frozen parameters have changed.
    """
    state, frozen = create_state(spec, pretrained.params, layout)
    inputs = {
        "the data": datasets.digest,
        "the tokenizer": tokenizer_digest(tokenizer_of(pretrained)),
        f"the frozen parameters of the {phase.name} phase": digest(frozen),
    }
    phase.restore(state, inputs)
    return SupervisedTraining(phase, spec, frozen, datasets, layout)


def mean_losses(training: SupervisedTraining) -> dict[str, float]:
    """The mean of each metric of the loss over all held-out rows, by name; empty without held-out rows."""
    totals: dict[str, float] = {}
    for batch in training.phase.logger.progress_bar(training.datasets.eval, "evaluating"):
        rows = put_rows(batch, training.layout)
        sums = jax.device_get(evaluate(training.spec, training.phase.state, training.frozen, rows))
        totals = {name: totals.get(name, 0.0) + float(value) for name, value in sums.items()}
    count = totals.pop("count", 0.0)
    return {name: total / max(count, 1) for name, total in totals.items()}


def train(
    training: SupervisedTraining,
    steps: int,
    *,
    evaluate: Callable[[int], Mapping[str, float]],
    eval_every: int,
    export: Callable[[], None],
) -> None:
    """Runs the remaining steps, then exports the model. Each step donates the state to the next.

    Args:
      training: the phase.
      steps: steps of the phase, those before a restart included.
      evaluate: (steps done) → metrics of the current parameters.
      eval_every: steps between evaluations; 0 = only after the last step.
      export: writes the model.
    """
    phase, logger = training.phase, training.phase.logger
    logger.info(f"compiling the first step{other_widths(training.datasets)}")
    batches = training.datasets.batches(phase.step, steps)
    with phase.saving(export):
        for step in phase.steps(steps, "step", evaluate, eval_every):
            started = time.perf_counter()
            batch = next(batches)
            logger.note_width(step, batch)
            state, metrics = debugged(phase.config.debug, functools.partial(_step, training, batch))
            metrics["tokens_per_second"] = metrics["tokens"] / (time.perf_counter() - started)
            shown = {name: metrics[name] for name in ("loss", "accuracy") if name in metrics}
            shown["tokens/s"] = metrics["tokens_per_second"]
            logger.log_metrics(step + 1, {f"train/{name}": value for name, value in metrics.items()}, **shown)
            good = check_step(logger, step + 1, metrics, batch, max_bad_steps=phase.config.max_bad_steps)
            phase.done(state, good=good)


def _step(training: SupervisedTraining, batch: Any) -> tuple[SupervisedState, dict[str, Any]]:
    rows = put_rows(batch, training.layout)
    state, metrics = update(training.spec, training.phase.state, training.frozen, rows)
    return state, jax.device_get(metrics)
