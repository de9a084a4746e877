"""Checkpoints of a phase: what a step needs to go on, written by orbax in the background, and whole or not at all.

    <folder>/<step>/state     every array, by name; read back onto any mesh
    <folder>/<step>/notes     JSON: what is not an array, and a checksum of every array
    <folder>.damaged/<step>   checkpoints whose checksums are wrong, moved out of the way

Checksums (`checksum.py`) are taken of the arrays before they are written and after they are read, so that no disk,
network or file system in between can change a bit unseen.
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from orbax.checkpoint import checkpoint_managers

from jax_rlhf.hub import CheckpointError
from jax_rlhf.parallel import ProcessError, barrier
from jax_rlhf.runtime.checksum import checksums
from jax_rlhf.runtime.completeness import can_be_read, mark_synced, of_checkpoint, was_synced
from jax_rlhf.runtime.config import CheckpointConfig
from jax_rlhf.runtime.notes import DamagedError, first_line, read_notes, reading, with_digest


class RestoreError(CheckpointError):
    """The checkpoints of a run are damaged, or not of this run; the message says how to mend it."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint held.

    Attributes:
      step: steps done.
      state: the arrays, in the tree that was asked for.
      notes: as they were saved.
    """

    step: int
    state: Any
    notes: dict[str, Any]


class _Manager(ocp.CheckpointManager):
    """Never asks JAX's preemption service, which knows of each process only what it asked last: `StopSignals` asks."""

    def reached_preemption(self, step: int) -> bool:
        del step
        return False

    def _finalize_checkpoint(self, step: int) -> None:
        """Called once a checkpoint has its name, and before older ones are deleted: a power cut must not take both."""
        super()._finalize_checkpoint(step)
        if jax.process_index() == 0:
            mark_synced(epath.Path(self.directory) / str(step))


@dataclasses.dataclass
class _Best(checkpoint_managers.PreservationPolicy):
    """Keeps the checkpoint whose metric is best.

    Not orbax's BestN: that reads metrics from files of their own, without a checksum, and a damaged one ends it.
    """

    lowest: bool
    metrics: dict[int, float] = dataclasses.field(default_factory=dict)  # by step

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        del context
        found = {one.step: self.metrics[one.step] for one in checkpoints if one.step in self.metrics}
        best = (min if self.lowest else max)(found, key=found.__getitem__, default=None)
        return [one.step == best for one in checkpoints]

    def improves(self, metric: float, steps: Sequence[int]) -> bool:
        others = [self.metrics[step] for step in steps if step in self.metrics]
        return all(metric < other if self.lowest else metric > other for other in others)


class Checkpoints:
    """A folder of checkpoints; of several processes all must call everything, in the same order."""

    def __init__(
        self, folder: epath.PathLike, config: CheckpointConfig, *, asynchronous: bool = True, say: Callable = print
    ) -> None:
        """Makes the folder, and removes what a writer that was killed left half-done.

        Args:
          folder: of the phase; a local path or gs://….
          config: what to keep.
          asynchronous: write in the background.
          say: shows a line to the user.

        Raises:
          OSError: the folder cannot be written.
        """
        self.folder, self._config, self._say = epath.Path(folder), config, say
        policies = checkpoint_managers
        kept: list[Any] = [policies.LatestN(config.keep)]
        if config.keep_every:
            kept.append(policies.EveryNSteps(config.keep_every))
        self._best = _Best(config.lowest_is_best)
        if config.best is not None:
            kept.append(self._best)
        self.folder.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            enable_async_checkpointing=asynchronous,
            cleanup_tmp_directories=True,
        )
        self._manager = _Manager(self.folder, item_names=("state", "notes"), options=options)
        self._latest = self._manager.latest_step()
        if config.best is not None:
            self._best.metrics = {step: metric for step in self.steps if (metric := self._metric(step)) is not None}

    @property
    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    @property
    def saving(self) -> bool:
        """Whether one is being written in the background."""
        return self._manager.is_saving_in_progress()

    def improves(self, metric: float | None) -> bool:
        """Whether the best checkpoint would be this one.

        Args:
          metric: of `config.best`; None, or not finite: no.

        Returns:
          Whether.
        """
        return metric is not None and math.isfinite(metric) and self._best.improves(metric, self.steps)

    def save(self, step: int, state: Any, notes: Mapping[str, Any], metric: float | None = None) -> None:
        """Begins a checkpoint: the arrays are copied to the host now, and written in the background.

        Args:
          step: steps done.
          state: a tree of arrays; the caller may donate them as soon as this returns.
          notes: what JSON can hold.
          metric: of `config.best`; None, or not finite: it has none.

        Raises:
          CheckpointError: this one, or the one before, could not be written.
        """
        self.wait()  # orbax would; an error of the one before is not this one's
        leaves = named(state)
        sums = checksums(leaves)
        arrays = {name: [list(leaf.shape), str(leaf.dtype), sums[name]] for name, leaf in leaves.items()}
        # As JSON will give it back; and a copy, since it is written while the caller goes on.
        metric = float(metric) if metric is not None and math.isfinite(metric) else None
        content = json.loads(json.dumps({"step": step, "arrays": arrays, "metric": metric, "notes": dict(notes)}))
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(leaves), notes=ocp.args.JsonSave(with_digest(content)))
        if metric is not None:
            self._best.metrics[step] = metric
        with self._explained(step):
            self._manager.save(step, args=items, force=True)
        self._latest = step

    def check(self) -> None:
        """Raises where writing in the background has failed.

        Raises:
          CheckpointError: says why, and which checkpoint is the last complete one.
        """
        if not self.saving:
            self.wait()

    def wait(self) -> None:
        """Until all is written.

        Raises:
          CheckpointError: it could not be.
        """
        with self._explained(self._latest):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and ends the background's threads."""
        self._manager.close()

    def drop_unfinished(self) -> None:
        """Moves a phase's first checkpoint away that was being written when the machine went down.

        It was not synced to the disk, its files can be read, and they are not whole: it was no checkpoint yet. A later
        one needs no such question, since `restore` goes back to the one before. Of several processes none looks: each
        has read its own part alone.
        """
        steps = self.steps
        if jax.process_count() > 1 or len(steps) != 1:
            return
        folder = self.folder / str(steps[0])
        if was_synced(folder) or not (wrong := of_checkpoint(folder)):
            return
        if can_be_read(folder) and of_checkpoint(folder):  # a disk or network that failed says nothing of its content
            self._say(f"{folder} was being written when the machine went down, and is not whole: {wrong}")
            self._move_away(steps)

    def restore(self, like: Any) -> Restored | None:
        """The last checkpoint that is whole; damaged ones after it are moved away.

        Args:
          like: `jax.ShapeDtypeStruct`s with shardings: what to read, and where to.

        Returns:
          What it held; None where the folder has no checkpoint.

        Raises:
          RestoreError: all that there are are damaged, or are of another model or optimizer.
          jax.errors.JaxRuntimeError: another process was lost, memory is short: nothing is wrong with the checkpoint.
        """
        found = self.steps
        for step in reversed(found):
            try:
                restored = self._read(step, like)
            except _OtherArraysError as error:
                raise RestoreError(f"{self.folder / str(step)}: {error}") from error
            except (DamagedError, ProcessError) as error:
                if getattr(error, "internal", False):  # of another process, and no damage
                    raise
                logging.debug("where it came from", exc_info=True)
                self._say(f"{self.folder / str(step)} is damaged: {first_line(error)}")
                continue
            self._move_away([other for other in found if other > step])
            return restored
        if found:
            raise RestoreError(
                f"{self.folder}: none of the checkpoints ({', '.join(map(str, found))}) can be read. Put one back "
                "from a copy, or begin anew with --overwrite."
            )
        return None

    def _read(self, step: int, like: Any) -> Restored:
        """In two parts, since one process may find its files damaged while the others' are whole."""
        with barrier(f"reading the checkpoint of step {step}"):
            try:
                content, leaves = self._read_files(step, like)
            except DamagedError:  # once more: a network's file system may have been away for a moment
                logging.warning("%s could not be read; trying once more.", self.folder / str(step))
                content, leaves = self._read_files(step, like)
        found = checksums(leaves)
        wrong = [name for name, (_, _, written) in content["arrays"].items() if found[name] != written]
        if wrong:
            raise DamagedError(f"{', '.join(wrong[:3])} has another checksum than when it was written")
        tree = jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in named(like)])
        return Restored(content["step"], tree, content["notes"])

    def _read_files(self, step: int, like: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        with reading():
            content = read_notes(self.folder / str(step))
        wanted = named(like)
        _check_arrays(content["arrays"], wanted)
        arguments = ocp.args.PyTreeRestore(
            item=wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted)
        )
        with reading():
            # Not the manager's restore: it waits for all processes at its end, and for ever where another one failed.
            return content, ocp.PyTreeCheckpointHandler().restore(self.folder / str(step) / "state", args=arguments)

    def _metric(self, step: int) -> float | None:
        try:
            with reading():
                return read_notes(self.folder / str(step))["metric"]
        except DamagedError as error:  # whether it can be read at all is seen where it is needed
            logging.warning("%s: its metric cannot be read: %s", self.folder / str(step), error)
            return None

    def _move_away(self, steps: list[int]) -> None:
        remote = "://" in str(self.folder)
        folder = self.folder if remote else epath.Path(Path(self.folder).resolve())  # a link may lead to another disk
        aside = folder.with_name(f"{folder.name}.damaged")
        with barrier("moving damaged checkpoints away"):
            for step in steps if jax.process_index() == 0 else ():
                target = aside / str(step)
                aside.mkdir(parents=True, exist_ok=True)
                if target.exists():
                    target.rmtree()
                (folder / str(step)).rename(target)
                self._say(f"it lies in {target} now.")
        if steps:
            self._manager.reload()

    @contextlib.contextmanager
    def _explained(self, step: int | None) -> Iterator[None]:
        """Names the checkpoint that an error of orbax is about, and the one that is left."""
        try:
            yield
        except (jax.errors.JaxRuntimeError, TimeoutError):  # another process is lost: no fault of disk or user
            raise
        except Exception as error:
            with contextlib.suppress(OSError):
                self._manager.reload()  # it has counted on this one
            whole = [other for other in self.steps if other != step]
            left = f"the last complete one is of step {whole[-1]}" if whole else "there is no complete one"
            raise CheckpointError(
                f"{self.folder}: the checkpoint of step {step} could not be written: {first_line(error)}; {left}. "
                "Once this is mended (is the disk full?), the same command goes on from there."
            ) from error


class _OtherArraysError(Exception):
    """A whole checkpoint, of something else."""


def _check_arrays(written: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    expected = {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in wanted.items()}
    found = {name: [shape, dtype] for name, (shape, dtype, _) in written.items()}
    differing = [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
    if differing:
        shown = "; ".join(
            f"{name} was {found.get(name, 'not there')} and would be {expected.get(name, 'not there')}"
            for name in differing[:4]
        )
        raise _OtherArraysError(
            f"it is of another model, number of trainable layers, or optimizer: {shown}. Give these settings as they "
            "were, or begin anew with --overwrite."
        )


def named(tree: Any) -> dict[str, Any]:
    """Leaves by the path to them.

    Args:
      tree: any.

    Returns:
      "a.b.c" → leaf.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def abstract(tree: Any) -> Any:
    """What arrays are, without their content.

    Args:
      tree: of arrays.

    Returns:
      `jax.ShapeDtypeStruct`s with shardings.
    """
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)
