"""What the SFT and the reward phase have in common: the loop over batches, and evaluation on held-out ones."""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jax_rlhf.config import RunConfig
from jax_rlhf.data import Datasets
from jax_rlhf.hub import Pretrained
from jax_rlhf.models.decoder import Params
from jax_rlhf.optim.supervised import Supervised, SupervisedState, create_state, evaluate, update
from jax_rlhf.parallel import Layout, put_rows
from jax_rlhf.runtime.numerics import check_step, debugged
from jax_rlhf.runtime.progress import Progress, digest, tokenizer_digest
from jax_rlhf.runtime.run_logger import Record


def total_steps(steps: int | None, epochs: float, datasets: Datasets) -> int:
    """Optimizer steps of a phase.

    Args:
      steps: as configured; None = by epochs.
      epochs: passes over the data.
      datasets: the data.

    Returns:
      1 or more.
    """
    return max(1, round(epochs * datasets.steps_per_epoch)) if steps is None else steps


def other_widths(datasets: Datasets) -> str:
    """What is said of a phase whose batches have several widths.

    Args:
      datasets: the data.

    Returns:
      The end of a sentence; empty where all batches have one width.
    """
    if len(datasets.widths) == 1:
        return ""
    widths = ", ".join(map(str, datasets.widths))
    return f"; batches may be {widths} tokens wide, and the first of each width compiles anew"


def evaluated(
    how: Supervised, state: SupervisedState, frozen: Params, datasets: Datasets, record: Record, layout: Layout | None
) -> dict[str, float]:
    """The loss's means over all held-out rows.

    Args:
      how: what.
      state: the parameters.
      frozen: the frozen ones.
      datasets: the data.
      record: shows how far it is.
      layout: the mesh; None = one device.

    Returns:
      name → mean; empty without held-out rows.
    """
    totals: dict[str, float] = {}
    for batch in record.watched(datasets.eval, "evaluating"):
        sums = jax.device_get(evaluate(how, state, frozen, put_rows(batch, layout)))
        totals = {name: totals.get(name, 0.0) + float(value) for name, value in sums.items()}
    count = totals.pop("count", 0.0)
    return {name: total / max(count, 1) for name, total in totals.items()}


def begun(
    record: Record,
    config: RunConfig,
    how: Supervised,
    pretrained: Pretrained,
    datasets: Datasets,
    layout: Layout | None,
    *,
    accept_changes: bool,
) -> tuple[Progress, Params]:
    """The phase's state: that of its last checkpoint, where there is one.

    Args:
      record: of the phase.
      config: the run's.
      how: what and how.
      pretrained: the model that the phase starts from.
      datasets: the data.
      layout: the mesh; None = one device.
      accept_changes: go on with other data, tokenizer or frozen parameters.

    Returns:
      (progress, whose state is a `SupervisedState`; frozen parameters).
    """
    state, frozen = create_state(how, pretrained, layout)
    inputs = {"the data": datasets.digest, "the tokenizer": tokenizer_digest(pretrained.tokenizer)}
    inputs[f"the frozen parameters of the {record.phase} phase"] = digest(frozen)
    progress = Progress(record, config, inputs, accept_changes=accept_changes)
    progress.restore(state)
    return progress, frozen


def train(
    config: RunConfig,
    how: Supervised,
    progress: Progress,
    frozen: Params,
    datasets: Datasets,
    steps: int,
    record: Record,
    layout: Layout | None,
    *,
    evaluate: Callable[[int], Mapping[str, float]],
    eval_every: int,
    export: Callable[[], None],
) -> None:
    """Runs the steps that are left, and saves the model; the state is donated from step to step.

    Args:
      config: the run's.
      how: what and how.
      progress: where to go on, and what saves.
      frozen: the frozen parameters.
      datasets: the data.
      steps: of the phase.
      record: writes metrics down.
      layout: the mesh; None = one device.
      evaluate: (steps done) → metrics of `progress.state`.
      eval_every: steps between evaluations; 0 = only after the last.
      export: writes the model.
    """
    record.say(f"compiling the first step{other_widths(datasets)}")
    batches = datasets.batches(progress.step, steps)
    with progress.saving(export):
        for step in progress.steps(steps, "step", evaluate, eval_every):
            started = time.perf_counter()
            batch = next(batches)
            record.compiles_for(step, batch)
            one_step = functools.partial(_step, how, progress.state, frozen, batch, layout)
            state, numbers = debugged(config.debug, one_step)
            numbers["tokens_per_second"] = numbers["tokens"] / (time.perf_counter() - started)
            shown = {name: numbers[name] for name in ("loss", "accuracy") if name in numbers}
            shown["tokens/s"] = numbers["tokens_per_second"]
            record.metrics(step + 1, {f"train/{name}": value for name, value in numbers.items()}, **shown)
            progress.done(state, good=check_step(config, record, step + 1, numbers, batch))


def _step(
    how: Supervised, state: SupervisedState, frozen: Params, batch: Any, layout: Layout | None
) -> tuple[SupervisedState, dict[str, Any]]:
    state, metrics = update(how, state, frozen, put_rows(batch, layout))
    return state, jax.device_get(metrics)
