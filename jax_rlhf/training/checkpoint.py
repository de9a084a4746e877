"""Checkpoints of a phase: what a step needs to go on, written by orbax in the background, and whole or not at all.

    <folder>/<step>/state     every array, by name; read back onto any mesh
    <folder>/<step>/notes     JSON: what is not an array, and a checksum of every array
    <folder>.damaged/<step>   checkpoints whose checksums are wrong, moved out of the way

Checksums (`checksum.py`) are taken of the arrays before they are written and after they are read, so that no disk,
network or file system in between can change a bit unseen.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from orbax.checkpoint import checkpoint_managers

from jax_rlhf.hub import CheckpointError
from jax_rlhf.parallel import together
from jax_rlhf.training.checksum import checksums


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a phase's state is saved, and what is kept.

    Attributes:
      every: steps (PPO: iterations) between checkpoints; 0 = by time alone.
      minutes: so long after the last one comes the next; None = by steps alone. The end of a phase and a stop that was
        asked for have one in any case.
      keep: the last so many.
      keep_every: those of steps that this divides stay as well; 0 = none.
      best: a metric of evaluations, such as "eval/score": the checkpoint where it was best stays as well; None = none.
      best_mode: whether the highest ("max") or the lowest ("min") is best.
    """

    every: int = 0
    minutes: float | None = 15.0
    keep: int = 2
    keep_every: int = 0
    best: str | None = None
    best_mode: Literal["max", "min"] = "max"

    def __post_init__(self) -> None:
        for name, least in (("every", 0), ("keep", 1), ("keep_every", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"config.checkpoint.{name}={getattr(self, name)} must be {least} or more.")
        if self.minutes is not None and self.minutes <= 0:
            raise ValueError(f"config.checkpoint.minutes={self.minutes} must be above 0, or None.")


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


class Checkpoints:
    """A folder of checkpoints; of several processes all must call everything, in the same order."""

    def __init__(
        self, folder: str | Path, config: CheckpointConfig, *, asynchronous: bool = True, say: Callable = print
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
        if config.best is not None:
            best = {"reverse": config.best_mode == "min", "n": 1, "keep_checkpoints_without_metrics": False}
            kept.append(policies.BestN(get_metric_fn=_value, **best))
        self.folder.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            best_fn=None if config.best is None else _value,  # else metrics are not written, and lost at a restart
            best_mode=config.best_mode,
            enable_async_checkpointing=asynchronous,
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(self.folder, item_names=("state", "notes"), options=options)
        self._latest = self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    @property
    def saving(self) -> bool:
        """Whether one is being written in the background."""
        return self._manager.is_saving_in_progress()

    def save(self, step: int, state: Any, notes: Mapping[str, Any], metric: float | None = None) -> None:
        """Begins a checkpoint: the arrays are copied to the host now, and written in the background.

        Args:
          step: steps done.
          state: a tree of arrays; the caller may donate them as soon as this returns.
          notes: what JSON can hold.
          metric: of `config.best`.

        Raises:
          CheckpointError: this one, or the one before, could not be written.
        """
        self.wait()  # orbax would; an error of the one before is not this one's
        leaves = named(state)
        sums = checksums(leaves)
        arrays = {name: [list(leaf.shape), str(leaf.dtype), sums[name]] for name, leaf in leaves.items()}
        # As JSON will give it back; and a copy, since it is written while the caller goes on.
        content = json.loads(json.dumps({"step": step, "arrays": arrays, "notes": dict(notes)}))
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(leaves), notes=ocp.args.JsonSave({"digest": _digest(content), **content})
        )
        metrics = None if metric is None else {"value": float(metric)}
        with self._explained(step):
            self._manager.save(step, args=items, metrics=metrics, force=True)
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

    def restore(self, like: Any) -> Restored | None:
        """The last checkpoint that is whole; damaged ones after it are moved away.

        Args:
          like: `jax.ShapeDtypeStruct`s with shardings: what to read, and where to.

        Returns:
          What it held; None where the folder has no checkpoint.

        Raises:
          RestoreError: all that there are are damaged, or are of another model or optimizer.
        """
        found = self.steps
        for step in reversed(found):
            try:
                restored = self._read(step, like)
            except _OtherArraysError as error:
                raise RestoreError(f"{self.folder / str(step)}: {error}") from error
            except Exception as error:  # orbax and tensorstore have many words for a file that is not as it was
                logging.debug("where it came from", exc_info=True)
                self._say(f"{self.folder / str(step)} is damaged: {_first_line(error)}")
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
        with together(f"reading the checkpoint of step {step}"):
            try:
                content, leaves = self._read_files(step, like)
            except _OtherArraysError:
                raise
            except Exception:  # once more: a network's file system may have been away for a moment
                logging.warning("%s could not be read; trying once more.", self.folder / str(step))
                content, leaves = self._read_files(step, like)
        found = checksums(leaves)
        wrong = [name for name, (_, _, written) in content["arrays"].items() if found[name] != written]
        if wrong:
            raise ValueError(f"{', '.join(wrong[:3])} has another checksum than when it was written")
        tree = jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in named(like)])
        return Restored(content["step"], tree, content["notes"])

    def _read_files(self, step: int, like: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        folder = self.folder / str(step)
        content = ocp.JsonCheckpointHandler().restore(folder / "notes")
        digest = content.pop("digest", None)
        if digest != _digest(content):
            raise ValueError("its notes have another checksum than when they were written")
        wanted = named(like)
        _check_arrays(content["arrays"], wanted)
        arguments = ocp.args.PyTreeRestore(
            item=wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted)
        )
        # Not the manager's restore: it waits for all processes at its end, and for ever where another one failed.
        return content, ocp.PyTreeCheckpointHandler().restore(folder / "state", args=arguments)

    def _move_away(self, steps: list[int]) -> None:
        aside = self.folder.with_name(f"{self.folder.name}.damaged")
        with together("moving damaged checkpoints away"):
            for step in steps if jax.process_index() == 0 else ():
                target = aside / str(step)
                aside.mkdir(parents=True, exist_ok=True)
                if target.exists():
                    target.rmtree()
                (self.folder / str(step)).rename(target)
                self._say(f"it lies in {target} now.")
        if steps:
            self._manager.reload()

    @contextlib.contextmanager
    def _explained(self, step: int | None) -> Iterator[None]:
        """Names the checkpoint that an error of orbax is about, and the one that is left."""
        try:
            yield
        except Exception as error:
            whole = [other for other in self.steps if other != step]
            left = f"the last complete one is of step {whole[-1]}" if whole else "there is no complete one"
            raise CheckpointError(
                f"{self.folder}: the checkpoint of step {step} could not be written: {_first_line(error)}; {left}. "
                "Once this is mended (is the disk full?), the same command goes on from there."
            ) from error


def _value(metrics: Mapping[str, float]) -> float:
    return metrics["value"]


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


def _digest(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:400]


def abstract(tree: Any) -> Any:
    """What arrays are, without their content.

    Args:
      tree: of arrays.

    Returns:
      `jax.ShapeDtypeStruct`s with shardings.
    """
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)
