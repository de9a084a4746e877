"""How far a phase is: it goes on from its last checkpoint, saves new ones as it goes, and where it is stopped."""

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import logging
from transformers import PreTrainedTokenizerBase

from jax_rlhf.config import RunConfig
from jax_rlhf.hub import CheckpointError
from jax_rlhf.io.durable import write_json
from jax_rlhf.io.json_files import read_object
from jax_rlhf.parallel import barrier
from jax_rlhf.runtime.checkpoint import Checkpoints, RestoreError, abstract, named
from jax_rlhf.runtime.checksum import checksums
from jax_rlhf.runtime.costs import COSTS, Costs
from jax_rlhf.runtime.numerics import FaultError
from jax_rlhf.runtime.preemption import Stopped
from jax_rlhf.runtime.remote import checkpoints_of, put_up, remote_of
from jax_rlhf.runtime.run_logger import Record
from jax_rlhf.runtime.watchdog import Watchdog

PROGRESS_FILE = "JAX_RLHF_PROGRESS_FILE"
"""In the environment: a file for the phase and step of the last checkpoint, read by launch scripts."""
_LONGEST_UPLOAD = 120.0
"""Minutes that a checkpoint may take to a bucket before the watchdog counts."""
# What was trained is no good then; and after FloatingPointError (debug) JAX has given its memory away without a word.
_NUMBERS = (FaultError, FloatingPointError)


class Progress:
    """The state of a phase, on its way from the first step to the last.

    Attributes:
      step: steps done.
      state: a tree of arrays, after that step.
      notes: what the phase must know of earlier steps, in what JSON can hold.
      costs: seconds that were no training.
      watchdog: a context in which it is noticed where the phase stands still; `saving` is in it.
    """

    def __init__(
        self,
        record: Record,
        config: RunConfig,
        inputs: Mapping[str, str],
        *,
        accept_changes: bool = False,
        signs: Sequence[Callable[[], Any]] = (),
    ) -> None:
        """Opens the checkpoints.

        Args:
          record: of the phase.
          config: the run's.
          inputs: what is not in a checkpoint and must be the same when the phase goes on: name → checksum.
          accept_changes: of inputs.
          signs: what tells the watchdog that the phase goes on, besides steps and batches.

        Raises:
          OSError: the folder cannot be written.
        """
        self.step, self.state, self.notes, self.costs = 0, None, {}, Costs()
        self._record, self._run, self._config = record, config, config.checkpoint
        self._inputs, self._accept_changes = dict(inputs), accept_changes
        self._checkpoints = Checkpoints(
            checkpoints_of(record.folder), config.checkpoint, asynchronous=not config.debug, say=record.say
        )
        self._saved, self._saved_at = 0, time.monotonic()
        self._position: dict[str, Any] | None = None
        self._evaluated, self._metric = True, None
        watched = dataclasses.replace(config.watchdog, action="warn") if self._may_pause(config) else config.watchdog
        signs = [lambda: record.beats, self._is_being_put_up, *signs]
        self.watchdog = Watchdog(watched, record.folder, signs, record.say, longest_call=config.ppo.reward.timeout)

    @staticmethod
    def _may_pause(config: RunConfig) -> bool:
        """Whether somebody may be looking at the run in a debugger."""
        return config.debug and config.watchdog.action == "exit"

    def _is_being_put_up(self) -> float:
        """Changes as a checkpoint goes to a bucket, where its bytes cannot be counted; but not for ever."""
        took = time.monotonic() - self._saved_at
        remote = remote_of(self._record.folder.parent) is not None and self._checkpoints.saving
        return took if remote and took < 60 * _LONGEST_UPLOAD else 0.0

    def restore(self, state: Any) -> Any:
        """The state of the last checkpoint, or the one given.

        Args:
          state: before the first step; its memory is freed where a checkpoint takes its place.

        Returns:
          The state to go on with.

        Raises:
          RestoreError: the checkpoints are damaged, of another model, or the inputs are not those they began with.
        """
        like = abstract(state)
        self._checkpoints.drop_unfinished()
        if self._checkpoints.steps:
            for leaf in jax.tree.leaves(state):
                leaf.delete()
        with self.costs.taking("restoring"):
            restored = self._checkpoints.restore(like)
        self.costs.go_on(self._former_costs({} if restored is None else restored.notes.get("costs", {})))
        if restored is None:
            self._note_costs()
            self.state = state
            return state
        self.step, self.state, self._saved = restored.step, restored.state, restored.step
        self.notes, self._evaluated = restored.notes["phase"], restored.notes["evaluated"]
        self._compare(restored.notes["inputs"])
        self.costs.repeated += self._record.continue_from(
            restored.notes["position"], self.step, evaluated=self._evaluated
        )
        self._note_costs()
        self._record.say(f"going on from the checkpoint of step {self.step}")
        self._tell_launcher()
        return self.state

    def _compare(self, before: Mapping[str, str]) -> None:
        changed = [name for name in {**before, **self._inputs} if before.get(name) != self._inputs.get(name)]
        if not changed:
            return
        what = f"{', '.join(changed)}: not what step {self.step} of this phase was reached with"
        if not self._accept_changes:
            raise RestoreError(
                f"{self._record.folder}: {what}. Put it back as it was; or go on all the same with --accept_changes, "
                "or begin anew with --overwrite."
            )
        self._record.say(f"{what} (--accept_changes).")

    def steps(
        self, total: int, unit: str, evaluate: Callable[[int], Mapping[str, float]], evaluate_every: int
    ) -> Iterator[int]:
        """The steps that are left, with a progress bar; `done` must be called at the end of each.

        Args:
          total: of the phase.
          unit: what the bar calls them.
          evaluate: (steps done) → metrics of the state, also in the files; called by `done`, and first of all where the
            phase was stopped in it.
          evaluate_every: steps between evaluations; 0 = only after the last.

        Yields:
          The step, from 0.
        """
        if not self._evaluated:
            evaluate(self.step)
            self._mark(evaluated=True)
        self._total, self._evaluate, self._evaluate_every = total, evaluate, evaluate_every
        self._saved_at = time.monotonic()
        self._record.stop.check()
        yield from self._record.steps(self.step, total, unit)

    def done(self, state: Any, *, good: bool = True) -> None:
        """A step is done: evaluates and saves where it is time to.

        Args:
          state: after the step.
          good: whether it is fit for a checkpoint; another has one only where the run is stopped, and at the end.

        Raises:
          Stopped: the run was asked to stop.
          CheckpointError: a checkpoint could not be written.
        """
        self.step, self.state = self.step + 1, state
        self.watchdog.step()
        with self.costs.taking("saving"):
            self._checkpoints.check()
        last, every, minutes = self.step == self._total, self._config.every, self._config.minutes
        evaluate = last or (self._evaluate_every > 0 and self.step % self._evaluate_every == 0)
        self._mark(evaluated=not evaluate)
        if evaluate:
            metric = self._best(self._evaluate(self.step))
            self._mark(evaluated=True)
            self._metric = metric
        waited = time.monotonic() - self._saved_at
        due = minutes is not None and waited >= 60 * minutes and not self._checkpoints.saving
        stop, due = self._record.stop.on_any_process(due or self._checkpoints.improves(self._metric))
        if last or (good and (due or (every and self.step % every == 0))):
            self._save()
        if stop and not last:
            raise Stopped(self._record.stop.reason or "another process was asked to stop")

    def _mark(self, *, evaluated: bool) -> None:
        """What a checkpoint of this step will say; should an evaluation be stopped, it says what was before."""
        self._evaluated, self._metric, self._position = evaluated, None, None  # not the former step's, should it fail
        self._position = self._record.position()

    def _best(self, metrics: Mapping[str, float]) -> float | None:
        best = self._config.best
        if best is not None and metrics and best not in metrics:
            self._record.say(f"config.checkpoint.best={best} is none of this phase's: {', '.join(metrics)}")
        return metrics.get(best)

    def _save(self) -> None:
        notes = {
            "phase": self.notes,
            "inputs": self._inputs,
            "position": self._record.position() if self._position is None else self._position,
            "evaluated": self._evaluated,
            "costs": self.costs.so_far(),
            "config": dataclasses.asdict(self._run),
        }
        with self.costs.taking("saving"):
            with barrier("writing metrics and samples"):  # what a checkpoint's position speaks of is there before it
                self._record.sync()
                put_up(self._record.folder.parent, self._record.phase)
            self._checkpoints.save(self.step, self.state, notes, self._metric)
        self._note_costs()
        self._tell_launcher()
        self._saved, self._saved_at = self.step, time.monotonic()

    def _former_costs(self, saved: Mapping[str, float]) -> Mapping[str, float]:
        """Of all starts before this one, those among them that saved nothing; else as the checkpoint has them."""
        try:
            return self.costs.checked(read_object(self._record.folder / COSTS))
        except (OSError, ValueError):
            return saved

    def _note_costs(self) -> None:
        """A start counts from its beginning on: it may be killed before it saves anything."""
        try:
            if jax.process_index() == 0:
                write_json(self._record.folder / COSTS, self.costs.so_far())
        except OSError as error:  # what is trained is worth more
            logging.warning("%s cannot be written: %s", self._record.folder / COSTS, error)

    def _tell_launcher(self) -> None:
        """How far complete checkpoints are, where a launch script asks: whether a run that is started again moves."""
        file, saved = os.environ.get(PROGRESS_FILE), self._checkpoints.steps
        if file and saved and jax.process_index() == 0:
            with contextlib.suppress(OSError):
                Path(file).write_text(f"{self._record.phase} {saved[-1]}\n", encoding="utf-8")

    @contextlib.contextmanager
    def saving(self, export: Callable[[], None]) -> Iterator[None]:
        """Keeps what was trained when the block ends: as a checkpoint where it fails or is stopped, and as a model.

        Of several processes all must save, so that one that fails by itself does not; the last checkpoint stays.

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
                except Exception as second:  # its update may have eaten the parameters
                    logging.error("%s: what was trained could not be saved: %s", self._record.folder, second)
                    if isinstance(error, Stopped):  # which says that all is saved
                        raise second from error
            raise
        with self.watchdog:
            with self.costs.taking("saving"):
                self._checkpoints.wait()
                self._tell_launcher()
                self._checkpoints.close()
            export()
        put_up(self._record.folder.parent, self._record.phase, models=True)

    def _save_last(self, *, good: bool) -> None:
        """A checkpoint of the step at hand, where it is fit for one and has none; waits for what is being written."""
        try:
            self._checkpoints.wait()
        except CheckpointError as former:  # perhaps of this very step, which is tried once more
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
                self._save_last(good=not isinstance(error, (CheckpointError, *_NUMBERS)))
        finally:  # which is not watched: nothing of it can be counted
            put_up(self._record.folder.parent, self._record.phase)
        if not self._checkpoints.steps:
            return
        where, saved = checkpoints_of(self._record.folder), self._checkpoints.steps[-1]
        self._record.say(f"step {saved} is saved in {where}; the same command goes on from there.")
        # Who is preempted has seconds; who pressed Ctrl-C may want to look at the model.
        preempted = isinstance(error, Stopped) and self._record.stop.reason in ("SIGTERM", "SIGHUP", "preemption")
        if not preempted and not isinstance(error, _NUMBERS):
            with self.watchdog:
                export()
            put_up(self._record.folder.parent, self._record.phase, models=True)


def digest(*parts: Any) -> str:
    """A checksum of texts, and of arrays wherever they are.

    Args:
      parts: texts, or trees of arrays.

    Returns:
      32 hexadecimal digits.
    """
    content = [part if isinstance(part, str) else sorted(checksums(named(part)).items()) for part in parts]
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A checksum of all that makes tokens of texts.

    Args:
      tokenizer: a fast one.

    Returns:
      32 hexadecimal digits.
    """
    # The padding and truncation that a caller set last are no part of it.
    content = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    special = sorted(f"{name}={token}" for name, token in tokenizer.special_tokens_map.items())
    return digest(json.dumps(content, sort_keys=True), *special, str(tokenizer.chat_template))
