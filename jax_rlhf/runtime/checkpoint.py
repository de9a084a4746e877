"""Checkpoints of a phase: all that it needs to continue, written atomically by orbax in the background.

    <folder>/<step>/state     all arrays, by name; they can be restored onto any mesh
    <folder>/<step>/notes     JSON: everything that is not an array, and a checksum of each array
    <folder>.damaged/<step>   checkpoints with wrong checksums, moved out of the way

Checksums (`checksum.py`) are computed from the arrays before they are written and after they are read. So a bit that a
disk, network or file system changes is detected.
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
from jax_rlhf.runtime.completeness import checkpoint_damage, is_readable, mark_synced, was_synced
from jax_rlhf.runtime.config import CheckpointConfig
from jax_rlhf.runtime.notes import DamagedError, first_line, read_notes, reading, with_digest


class RestoreError(CheckpointError):
    """The checkpoints of a run are damaged, or belong to another run; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """The content of a checkpoint.

    Attributes:
      step: steps done.
      state: the arrays, in the requested tree.
      notes: the JSON values that were saved.
    """

    step: int
    state: Any
    notes: dict[str, Any]


class _Manager(ocp.CheckpointManager):
    """Never queries JAX's preemption service, which keeps only a process's last query: `StopSignals` queries it."""

    def reached_preemption(self, step: int) -> bool:
        del step
        return False

    def _finalize_checkpoint(self, step: int) -> None:
        """Syncs a checkpoint after its final rename, before older ones are deleted: a power cut must not lose both."""
        super()._finalize_checkpoint(step)
        if jax.process_index() == 0:
            mark_synced(epath.Path(self.directory) / str(step))


@dataclasses.dataclass
class _Best(checkpoint_managers.PreservationPolicy):
    """Keeps the checkpoint with the best metric.

    It replaces orbax's BestN, which reads metrics from extra files without checksums, and fails if one is damaged.
    """

    lowest: bool
    metrics: dict[int, float] = dataclasses.field(default_factory=dict)  # by step

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        del context
        metrics = {one.step: self.metrics[one.step] for one in checkpoints if one.step in self.metrics}
        best = (min if self.lowest else max)(metrics, key=metrics.__getitem__, default=None)
        return [one.step == best for one in checkpoints]

    def improves(self, metric: float, steps: Sequence[int]) -> bool:
        others = [self.metrics[step] for step in steps if step in self.metrics]
        return all(metric < other if self.lowest else metric > other for other in others)


class Checkpoints:
    """The checkpoints in a folder. All processes must call the same methods in the same order."""

    def __init__(
        self,
        folder: epath.PathLike,
        config: CheckpointConfig,
        *,
        asynchronous: bool = True,
        print_line: Callable = print,
    ) -> None:
        """Creates the folder, and removes incomplete checkpoints of a process that was killed.

        Args:
          folder: <workdir>/<phase>/checkpoints; a local path or gs://….
          config: which checkpoints to keep.
          asynchronous: write in the background.
          print_line: prints a line for the user.

        Raises:
          OSError: the folder cannot be written.
        """
        self.folder, self._config, self._print_line = epath.Path(folder), config, print_line
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
        """The steps of all complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    @property
    def saving(self) -> bool:
        """Whether a checkpoint is being written in the background."""
        return self._manager.is_saving_in_progress()

    def improves(self, metric: float | None) -> bool:
        """Whether this value of the metric `config.best` beats all checkpoints; False for None, NaN and infinity."""
        return metric is not None and math.isfinite(metric) and self._best.improves(metric, self.steps)

    def save(self, step: int, state: Any, notes: Mapping[str, Any], metric: float | None = None) -> None:
        """Starts a checkpoint: copies the arrays to the host, then writes them in the background.

        Args:
          step: steps done.
          state: a tree of arrays, which the caller may donate after this returns.
          notes: JSON values.
          metric: the value of the metric `config.best`; None or non-finite = this checkpoint has none.

        Raises:
          CheckpointError: this checkpoint, or the one before, could not be written.
        """
        self.wait()  # orbax waits too, but would report an error of the earlier checkpoint for this one
        leaves = leaves_by_path(state)
        sums = checksums(leaves)
        arrays = {name: [list(leaf.shape), str(leaf.dtype), sums[name]] for name, leaf in leaves.items()}
        # The JSON round trip gives a copy, since the caller may change the notes while they are written.
        metric = float(metric) if metric is not None and math.isfinite(metric) else None
        content = json.loads(json.dumps({"step": step, "arrays": arrays, "metric": metric, "notes": dict(notes)}))
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(leaves), notes=ocp.args.JsonSave(with_digest(content)))
        if metric is not None:
            self._best.metrics[step] = metric
        with self._explained(step):
            self._manager.save(step, args=items, force=True)
        self._latest = step

    def check(self) -> None:
        """Raises if a write in the background has failed.

        Raises:
          CheckpointError: the message has the cause, and the last complete checkpoint.
        """
        if not self.saving:
            self.wait()

    def wait(self) -> None:
        """Waits until pending writes are complete.

        Raises:
          CheckpointError: a checkpoint could not be written.
        """
        with self._explained(self._latest):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for pending writes, and ends the background threads."""
        self._manager.close()

    def drop_unfinished(self) -> None:
        """Moves the only checkpoint away if it was being written when the machine went down.

        Such a checkpoint was never synced to the disk, and its files are readable but incomplete. If there are several,
        `restore` skips the damaged ones. With several processes nothing is done, since each process reads only its own
        part.
        """
        steps = self.steps
        if jax.process_count() > 1 or len(steps) != 1:
            return
        folder = self.folder / str(steps[0])
        if was_synced(folder) or not (damage := checkpoint_damage(folder)):
            return
        if is_readable(folder) and checkpoint_damage(folder):  # not if a disk or network failed for a moment
            self._print_line(f"{folder} was being written when the machine went down, and is incomplete: {damage}")
            self._move_away(steps)

    def restore(self, like: Any) -> Restored | None:
        """Restores the last intact checkpoint, and moves later, damaged ones away.

        Args:
          like: `jax.ShapeDtypeStruct`s with shardings: the arrays to read, and where to put them.

        Returns:
          Its content; None if the folder has no checkpoint.

        Raises:
          RestoreError: all checkpoints are damaged, or belong to another model or optimizer.
          jax.errors.JaxRuntimeError: another process was lost, or memory is exhausted; the checkpoint is not at fault.
        """
        steps = self.steps
        for step in reversed(steps):
            try:
                restored = self._read(step, like)
            except _OtherArraysError as error:
                raise RestoreError(f"{self.folder / str(step)}: {error}") from error
            except (DamagedError, ProcessError) as error:
                if getattr(error, "internal", False):  # an error of another process, no damage
                    raise
                logging.debug("traceback", exc_info=True)
                self._print_line(f"{self.folder / str(step)} is damaged: {first_line(error)}")
                continue
            self._move_away([other for other in steps if other > step])
            return restored
        if steps:
            raise RestoreError(
                f"{self.folder}: none of the checkpoints ({', '.join(map(str, steps))}) can be read. Restore one from "
                "a copy, or start again with --overwrite."
            )
        return None

    def _read(self, step: int, like: Any) -> Restored:
        """Reads a checkpoint. The barrier makes all processes fail if one finds its files damaged."""
        with barrier(f"reading the checkpoint of step {step}"):
            try:
                content, leaves = self._read_files(step, like)
            except DamagedError:  # a network file system may have been unavailable for a moment
                logging.warning("%s could not be read; trying again.", self.folder / str(step))
                content, leaves = self._read_files(step, like)
        sums = checksums(leaves)
        wrong = [name for name, (_, _, written) in content["arrays"].items() if sums[name] != written]
        if wrong:
            raise DamagedError(f"wrong checksum of {', '.join(wrong[:3])}")
        tree = jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in leaves_by_path(like)])
        return Restored(content["step"], tree, content["notes"])

    def _read_files(self, step: int, like: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        with reading():
            content = read_notes(self.folder / str(step))
        wanted = leaves_by_path(like)
        _check_arrays(content["arrays"], wanted)
        arguments = ocp.args.PyTreeRestore(
            item=wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted)
        )
        with reading():
            # Not the manager's restore, which waits for all processes at its end, and so hangs if another one failed.
            return content, ocp.PyTreeCheckpointHandler().restore(self.folder / str(step) / "state", args=arguments)

    def _metric(self, step: int) -> float | None:
        try:
            with reading():
                return read_notes(self.folder / str(step))["metric"]
        except DamagedError as error:  # `restore` deals with it
            logging.warning("%s: its metric cannot be read: %s", self.folder / str(step), error)
            return None

    def _move_away(self, steps: list[int]) -> None:
        remote = "://" in str(self.folder)
        folder = self.folder if remote else epath.Path(Path(self.folder).resolve())  # a link may point to another disk
        aside = folder.with_name(f"{folder.name}.damaged")
        with barrier("moving damaged checkpoints away"):
            for step in steps if jax.process_index() == 0 else ():
                target = aside / str(step)
                aside.mkdir(parents=True, exist_ok=True)
                if target.exists():
                    target.rmtree()
                (folder / str(step)).rename(target)
                self._print_line(f"it was moved to {target}.")
        if steps:
            self._manager.reload()

    @contextlib.contextmanager
    def _explained(self, step: int | None) -> Iterator[None]:
        """Turns an error of orbax into a CheckpointError that names the failed and the last complete checkpoint."""
        try:
            yield
        except (jax.errors.JaxRuntimeError, TimeoutError):  # another process is lost; not a fault of disk or user
            raise
        except Exception as error:
            with contextlib.suppress(OSError):
                self._manager.reload()  # forgets the failed checkpoint
            complete = [other for other in self.steps if other != step]
            last = f"the last complete one is of step {complete[-1]}" if complete else "there is no complete one"
            raise CheckpointError(
                f"{self.folder}: the checkpoint of step {step} could not be written: {first_line(error)}; {last}. "
                "Fix the cause (is the disk full?), and run the same command again to continue from there."
            ) from error


class _OtherArraysError(Exception):
    """An intact checkpoint that has other arrays than the state."""


def _check_arrays(written: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises _OtherArraysError if names, shapes or dtypes differ."""
    expected = {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in wanted.items()}
    found = {name: [shape, dtype] for name, (shape, dtype, _) in written.items()}
    differing = [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
    if differing:
        shown = "; ".join(
            f"{name} was {found.get(name, 'missing')} and would be {expected.get(name, 'missing')}"
            for name in differing[:4]
        )
        raise _OtherArraysError(
            f"it has another model, number of trainable layers, or optimizer: {shown}. Restore the earlier settings, "
            "or start again with --overwrite."
        )


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree: path, as "a.b.c" → leaf."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def abstract(tree: Any) -> Any:
    """Converts a tree of arrays to `jax.ShapeDtypeStruct`s with shardings."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)
