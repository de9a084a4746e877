"""A phase of a run, as a context: its log, its checkpoints, its watchdog, and what stops it.

with Phase(workdir / "sft", config, stop) as phase:
    state = phase.restore(state, {"the data": digest})            # the last checkpoint's, if there is one
    with phase.saving(export_model):                              # saves on success, on errors and on a stop
        for step in phase.steps(total, "step", evaluate, eval_every):
            state = update(phase.state, batch(step))
            phase.done(state)                                     # evaluates and saves when it is time to
    phase.finish({"loss": loss})                                  # writes summary.json
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import jax
from absl import logging
from transformers import PreTrainedTokenizerBase

from jax_rlhf.data import DataConfig, Datasets, create_datasets
from jax_rlhf.data.datasets import Phase as DataPhase
from jax_rlhf.hub import CheckpointError
from jax_rlhf.io.durable import write_json
from jax_rlhf.io.json_files import read_object
from jax_rlhf.parallel import barrier, check_same_on_all_processes
from jax_rlhf.runtime.checkpoint import Checkpoints, RestoreError, abstract, leaves_by_path
from jax_rlhf.runtime.checksum import checksums
from jax_rlhf.runtime.config import PhaseConfig
from jax_rlhf.runtime.costs import COSTS, Costs
from jax_rlhf.runtime.numerics import FaultError
from jax_rlhf.runtime.preemption import Stopped, StopSignals
from jax_rlhf.runtime.remote import checkpoints_of, remote_of, upload
from jax_rlhf.runtime.run_logger import RunLogger
from jax_rlhf.runtime.watchdog import Watchdog

PROGRESS_FILE = "JAX_RLHF_PROGRESS_FILE"
"""Environment variable: a file for the phase and step of the last checkpoint, which launch scripts read."""
_LONGEST_UPLOAD = 120.0
"""Minutes for which the upload of a checkpoint to a bucket counts as activity."""
# After FaultError the parameters are not worth a checkpoint. After FloatingPointError (debug) JAX has freed them.
_NUMERIC_ERRORS = (FaultError, FloatingPointError)


class Phase:
    """A phase on its way from the first step to the last; a context manager.

    Attributes:
      name: "sft", "reward" or "ppo".
      folder: <workdir>/<name>.
      config: the settings that every phase reads.
      logger: writes metrics.jsonl, samples.jsonl and summary.json, and shows the progress.
      stop: what asks the run to stop.
      step: steps done.
      state: a tree of arrays, the state after that step.
      notes: what the phase must know of earlier steps, as JSON values. Checkpoints contain it.
      costs: seconds spent on anything but training.
      activity: more functions whose values change while the phase is active, for the watchdog; add to it before
        `restore`.
      watchdog: a context that notices when the phase stalls; `saving` enters it.
    """

    def __init__(
        self, folder: Path, config: PhaseConfig, stop: StopSignals | None = None, *, accept_changes: bool = False
    ) -> None:
        """Opens the log. `restore` opens the checkpoints.

        Args:
          folder: <workdir>/<name>; is created.
          config: the settings that every phase reads.
          stop: the run's signal handlers; None = the phase installs its own.
          accept_changes: continue although data, tokenizer or frozen parameters have changed.

        Raises:
          ValueError: config.log asks for Weights & Biases, which is not installed.
          OSError: the folder cannot be written.
        """
        self.name, self.folder, self.config = folder.name, folder, config
        self.logger = RunLogger(folder, config.log, stop, settings=config.run)
        self.stop = self.logger.stop
        self.step, self.notes, self.costs = 0, {}, Costs()
        self.state: Any = None
        self.activity: list[Callable[[], Any]] = []
        self._inputs: dict[str, str] = {}
        self._accept_changes = accept_changes
        self._saved, self._saved_at = 0, time.monotonic()
        self._position: dict[str, Any] | None = None
        self._evaluated, self._metric = True, None

    def __enter__(self) -> "Phase":
        self.logger.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.logger.__exit__(kind, error, trace)

    def _create_watchdog(self) -> Watchdog:
        config = self.config.watchdog
        if self.config.debug and config.action == "exit":  # the run may be paused in a debugger
            config = dataclasses.replace(config, action="warn")
        activity = [lambda: self.logger.heartbeats, self._seconds_of_upload, *self.activity]
        return Watchdog(config, self.folder, activity, self.logger.info, longest_call=self.config.longest_call)

    def _seconds_of_upload(self) -> float:
        """Changes while a checkpoint is uploaded to a bucket, whose bytes cannot be counted, for a limited time."""
        took = time.monotonic() - self._saved_at
        remote = remote_of(self.folder.parent) is not None and self._checkpoints.saving
        return took if remote and took < 60 * _LONGEST_UPLOAD else 0.0

    def create_datasets(self, data: DataConfig, tokenizer: PreTrainedTokenizerBase, **keywords: Any) -> Datasets:
        """The phase's data: checks that all processes read the same, and logs how many rows there are.

        Args:
          data: the data's settings.
          tokenizer: the policy's.
          keywords: as in `data.create_datasets`.

        Raises:
          DataError, ValueError, FileNotFoundError: the data cannot be used.
          ProcessError: another process has other data.
        """
        datasets = create_datasets(data, tokenizer, cast(DataPhase, self.name), **keywords)
        check_same_on_all_processes(datasets.digest, "the data")
        self.logger.log_datasets(datasets)
        return datasets

    def restore(self, state: Any, inputs: Mapping[str, str]) -> Any:
        """The state of the last checkpoint; without a checkpoint, the one given.

        Args:
          state: the state before the first step. Its memory is freed if a checkpoint replaces it.
          inputs: what a checkpoint does not contain and must be the same when the phase continues: name → checksum.

        Returns:
          The state to continue with.

        Raises:
          RestoreError: the checkpoints are damaged, belong to another model, or were written with other inputs.
        """
        self._inputs = dict(inputs)
        like = abstract(state)
        self._checkpoints = Checkpoints(
            checkpoints_of(self.folder),
            self.config.checkpoint,
            asynchronous=not self.config.debug,
            print_line=self.logger.info,
        )
        self.watchdog = self._create_watchdog()
        self._checkpoints.drop_unfinished()
        if self._checkpoints.steps:
            for leaf in jax.tree.leaves(state):
                leaf.delete()
        with self.costs.measure("restoring"):
            restored = self._checkpoints.restore(like)
        self.costs.add(self._former_costs({} if restored is None else restored.notes.get("costs", {})))
        if restored is None:
            self._note_costs()
            self.state = state
            return state
        self.step, self.state, self._saved = restored.step, restored.state, restored.step
        self.notes, self._evaluated = restored.notes["phase"], restored.notes["evaluated"]
        self._compare(restored.notes["inputs"])
        self.costs.repeated += self.logger.continue_from(
            restored.notes["position"], self.step, evaluated=self._evaluated
        )
        self._note_costs()
        self.logger.info(f"continuing from the checkpoint of step {self.step}")
        self._tell_launcher()
        return self.state

    def _compare(self, before: Mapping[str, str]) -> None:
        changed = [name for name in {**before, **self._inputs} if before.get(name) != self._inputs.get(name)]
        if not changed:
            return
        what = f"{', '.join(changed)} changed since step {self.step} of this phase"
        if not self._accept_changes:
            raise RestoreError(
                f"{self.folder}: {what}. Restore what it was, continue with the change by --accept_changes, or start "
                "again with --overwrite."
            )
        self.logger.info(f"{what} (--accept_changes).")

    def steps(
        self, total: int, unit: str, evaluate: Callable[[int], Mapping[str, float]], evaluate_every: int
    ) -> Iterator[int]:
        """The remaining steps, with a progress bar. Call `done` at the end of each.

        Args:
          total: steps of the phase.
          unit: name of a step on the progress bar.
          evaluate: (steps done) → metrics of the state, which it has also logged. `done` calls it. It is called first
            if the phase was stopped during an evaluation.
          evaluate_every: steps between evaluations; 0 = only after the last step.

        Yields:
          The step, from 0.
        """
        if not self._evaluated:
            evaluate(self.step)
            self._mark(evaluated=True)
        self._total, self._evaluate, self._evaluate_every = total, evaluate, evaluate_every
        self._saved_at = time.monotonic()
        self.stop.check()
        yield from self.logger.steps(self.step, total, unit)

    def done(self, state: Any, *, good: bool = True) -> None:
        """Ends a step: evaluates and saves when it is time to.

        Args:
          state: the state after the step.
          good: whether the update was finite. A state after a bad step is saved only when the run stops or ends.

        Raises:
          Stopped: the run was asked to stop.
          CheckpointError: a checkpoint could not be written.
        """
        self.step, self.state = self.step + 1, state
        self.watchdog.step()
        with self.costs.measure("saving"):
            self._checkpoints.check()
        last, every, minutes = self.step == self._total, self.config.checkpoint.every, self.config.checkpoint.minutes
        evaluate = last or (self._evaluate_every > 0 and self.step % self._evaluate_every == 0)
        self._mark(evaluated=not evaluate)
        if evaluate:
            metric = self._best(self._evaluate(self.step))
            self._mark(evaluated=True)
            self._metric = metric
        waited = time.monotonic() - self._saved_at
        due = minutes is not None and waited >= 60 * minutes and not self._checkpoints.saving
        stop, due = self.stop.on_any_process(due or self._checkpoints.improves(self._metric))
        if last or (good and (due or (every and self.step % every == 0))):
            self._save()
        if stop and not last:
            raise Stopped(self.stop.reason or "another process was asked to stop")

    def _mark(self, *, evaluated: bool) -> None:
        """Sets what a checkpoint of this step contains: after an interrupted evaluation, the position before it."""
        self._evaluated, self._metric, self._position = evaluated, None, None  # position() may fail
        self._position = self.logger.position()

    def _best(self, metrics: Mapping[str, float]) -> float | None:
        best = self.config.checkpoint.best
        if best is not None and metrics and best not in metrics:
            self.logger.info(
                f"config.checkpoint.best={best} is not a metric of this phase, which has {', '.join(metrics)}"
            )
        return None if best is None else metrics.get(best)

    def _save(self) -> None:
        notes = {
            "phase": self.notes,
            "inputs": self._inputs,
            "position": self.logger.position() if self._position is None else self._position,
            "evaluated": self._evaluated,
            "costs": self.costs.totals(),
            "config": self.config.run,
        }
        with self.costs.measure("saving"):
            with barrier("writing metrics and samples"):  # before the checkpoint that refers to them
                self.logger.sync()
                upload(self.folder.parent, self.name)
            self._checkpoints.save(self.step, self.state, notes, self._metric)
        self._note_costs()
        self._tell_launcher()
        self._saved, self._saved_at = self.step, time.monotonic()

    def _former_costs(self, saved: Mapping[str, float]) -> Mapping[str, float]:
        """The costs of all earlier starts, from costs.json, or else from the checkpoint, which lacks later starts."""
        try:
            return self.costs.checked(read_object(self.folder / COSTS))
        except (OSError, ValueError):
            return saved

    def _note_costs(self) -> None:
        """Writes costs.json. A start counts at once, since it may be killed before it saves anything."""
        try:
            if jax.process_index() == 0:
                write_json(self.folder / COSTS, self.costs.totals())
        except OSError as error:  # no reason to lose what was trained
            logging.warning("%s cannot be written: %s", self.folder / COSTS, error)

    def _tell_launcher(self) -> None:
        """Tells a launch script the last complete checkpoint, so that it knows whether a restarted run advances."""
        file, saved = os.environ.get(PROGRESS_FILE), self._checkpoints.steps
        if file and saved and jax.process_index() == 0:
            with contextlib.suppress(OSError):
                Path(file).write_text(f"{self.name} {saved[-1]}\n", encoding="utf-8")

    @contextlib.contextmanager
    def saving(self, export: Callable[[], None]) -> Iterator[None]:
        """Saves what was trained when the block ends: a checkpoint after an error or a stop, and the model.

        All processes take part in a save: a process that fails alone saves nothing, and the last checkpoint stays.

        Args:
          export: writes the model.

        Yields:
          Nothing.
        """
        try:
            with self.watchdog:
                yield
        except BaseException as error:
            if jax.process_count() == 1 or getattr(error, "on_all_processes", False):
                try:
                    self._rescue(error, export)
                except Exception as second:  # e.g. the update had already donated the parameters
                    logging.error("%s: what was trained could not be saved: %s", self.folder, second)
                    if isinstance(error, Stopped):  # whose message claims that all is saved
                        raise second from error
            raise
        with self.watchdog:
            with self.costs.measure("saving"):
                self._checkpoints.wait()
                self._tell_launcher()
                self._checkpoints.close()
            export()
        upload(self.folder.parent, self.name, models=True)

    def finish(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Writes summary.json, which marks the phase as finished.

        Args:
          result: what to report.

        Returns:
          The same, as a dict.
        """
        self.logger.write_summary(dict(result) | self.costs.summary())
        return dict(result)

    def _save_last(self, *, good: bool) -> None:
        """Saves the current step unless it is bad or saved already, and waits for pending writes."""
        try:
            self._checkpoints.wait()
        except CheckpointError as former:  # perhaps of this step, which is tried again
            logging.error("%s", former)
            self._saved = max(self._checkpoints.steps, default=0)
        try:
            if good and self.step > self._saved:
                self._save()
            self._checkpoints.wait()
        finally:
            self._tell_launcher()
            self._checkpoints.close()

    def _rescue(self, error: BaseException, export: Callable[[], None]) -> None:
        try:
            with self.watchdog:
                self._save_last(good=not isinstance(error, (CheckpointError, *_NUMERIC_ERRORS)))
        finally:  # without the watchdog, which cannot count an upload's bytes
            upload(self.folder.parent, self.name)
        if not self._checkpoints.steps:
            return
        where, saved = checkpoints_of(self.folder), self._checkpoints.steps[-1]
        self.logger.info(f"step {saved} is saved in {where}; the same command continues from there.")
        # A preempted machine has seconds left. After Ctrl-C the user may want to look at the model.
        preempted = isinstance(error, Stopped) and self.stop.reason in ("SIGTERM", "SIGHUP", "preemption")
        if not preempted and not isinstance(error, _NUMERIC_ERRORS):
            with self.watchdog:
                export()
            upload(self.folder.parent, self.name, models=True)


def digest(*parts: Any) -> str:
    """A checksum, 32 hexadecimal digits, of texts and of trees of arrays on any devices."""
    content = [part if isinstance(part, str) else sorted(checksums(leaves_by_path(part)).items()) for part in parts]
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A checksum, 32 hexadecimal digits, of all that turns texts into tokens.

    Args:
      tokenizer: a fast tokenizer.
    """
    # Without the padding and truncation that a caller set last.
    backend: Any = tokenizer.backend_tokenizer
    content = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
    special = sorted(f"{name}={token}" for name, token in tokenizer.special_tokens_map.items())
    return digest(json.dumps(content, sort_keys=True), *special, str(tokenizer.chat_template))
