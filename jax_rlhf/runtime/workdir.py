"""A run's folder: whether it is this config's, how far its phases are, and what of it may be deleted."""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import logging
from filelock import BaseFileLock, FileLock, Timeout
from ml_collections import ConfigDict

from jax_rlhf.config import run_config
from jax_rlhf.data.config import PHASES
from jax_rlhf.io.durable import sync, write_json, write_text
from jax_rlhf.io.json_files import JSONFileError, read_object
from jax_rlhf.runtime.manifest import ManifestError, check_deletable
from jax_rlhf.runtime.notes import last_notes
from jax_rlhf.runtime.remote import checkpoints_of, delete, remote_of, upload
from jax_rlhf.settings import new_name

_CONFIG = "config.json"
_LOCK = ".lock"
_OVERWRITTEN = "overwritten.json"  # the config of the run that did it, as long as that has not ended
_FREE = (
    "phases",
    "log",
    "checkpoint",
    "watchdog",
    "max_bad_steps",
    "debug",
)  # may differ from run to run in one workdir
_OF_THE_MACHINE = (
    "mesh",
    "rollout_mesh",
    "remat",
    "attention",
    "dtype",
    "offload",
    "prefetch",
)  # equal but for rounding


class WorkdirError(ValueError):
    """The workdir is not this run's, or lacks what a phase needs; the message says how to mend it."""


def open_workdir(
    workdir: Path,
    config: Mapping[str, Any] | ConfigDict,
    phases: tuple[str, ...],
    *,
    overwrite: bool,
    accept_changes: bool = False,
) -> list[str]:
    """Makes the workdir and writes the resolved config there, or checks that what is there can go on with it.

    A phase that is not finished goes on with changed settings of its own; one that is finished was made with the former
    ones. Model, data and seed are those of the whole run.

    Args:
      workdir: the folder.
      config: the resolved config, nested.
      phases: those to run.
      overwrite: what these phases left there before is deleted.
      accept_changes: whatever changed.

    Returns:
      What changed and is accepted, a line each.

    Raises:
      WorkdirError: the folder belongs to another config; says which fields differ.
    """
    wanted = json.loads(ConfigDict(config).to_json_best_effort())
    changed: dict[str, str] = {}
    states = {phase: status(workdir, phase) for phase in PHASES}
    said = []
    # Where no phase has left anything, an earlier start failed: there is no run to differ from.
    if not overwrite and set(states.values()) != {"new"}:
        lost, changed = _changes(workdir, config, wanted, accept_changes=accept_changes)
        said = [lost] if lost else []
        refused = [line for name, line in changed.items() if not _can_change(name, states)]
        if refused and not accept_changes:
            raise WorkdirError(
                f"{workdir} belongs to a run of another config: {'; '.join(refused[:8])}. {lost}Take another --workdir "
                "(earlier results are found with --config.sft_model_path and --config.reward_model.path), --overwrite "
                f"to repeat {', '.join(phases)} here, or --accept_changes to go on all the same."
            )
    workdir.mkdir(parents=True, exist_ok=True)
    if overwrite:
        check_overwrite(workdir, phases)  # once more: hours may have gone since the run began, and now it has the lock
        for phase in phases:
            delete(workdir, phase)
    write_json(workdir / _CONFIG, wanted)
    sync(workdir.parent)
    if overwrite:  # all is done
        write_text(workdir / _OVERWRITTEN, _as_text(config))
    upload(workdir)
    return [*said, *changed.values()]


def _changes(
    workdir: Path, config: Mapping[str, Any] | ConfigDict, wanted: dict[str, Any], *, accept_changes: bool
) -> tuple[str, dict[str, str]]:
    """(what to say where config.json is lost, what differs from the settings that the run had: field → a line)."""
    file = workdir / _CONFIG
    try:
        before = read_object(file)
        why = "" if before.keys() >= wanted.keys() else "it lacks settings"
    except FileNotFoundError:
        before, why = {}, "it is missing"
    except JSONFileError as error:
        before, why = {}, str(error)
    former = next((path for path in _paths(before) if new_name(path)), None)
    if former is not None:
        what = (
            f"{file} is of an earlier version of this program, in which config.{new_name(former)} was config.{former}"
        )
        if not accept_changes:
            raise WorkdirError(
                f"{what}. Take another --workdir (its models are found with --config.sft_model_path and "
                "--config.reward_model.path), finish the run with that version, or go on with the settings that are "
                "given: --accept_changes."
            )
        return f"{what}; the settings that are given are taken. ", {}
    if not why:
        return "", dict(_differences(before, wanted))
    for phase in reversed(PHASES):
        found = last_notes(checkpoints_of(workdir / phase))
        if found is not None:
            step, notes = found
            now = json.loads(json.dumps(dataclasses.asdict(run_config(config))))
            lost = (
                f"{file} was lost ({why}); settings were compared with those in {phase}'s checkpoint of step {step}. "
            )
            return lost, dict(_differences(notes["config"], now))
    if not accept_changes:
        raise WorkdirError(
            f"{file} is lost ({why}), and no checkpoint has the settings of this run. Put it back from a copy, or go "
            "on with the settings that are given: --accept_changes."
        )
    return f"{file} was lost ({why}); the settings that are given are taken. ", {}


def forget_failed_start(workdir: Path) -> None:
    """Takes the config away again where no phase got as far as to leave anything.

    Args:
      workdir: the folder.
    """
    if any(status(workdir, phase) != "new" for phase in PHASES):
        return
    (workdir / _CONFIG).unlink(missing_ok=True)
    remote = remote_of(workdir)
    if remote is not None:
        (remote / "config.json").unlink(missing_ok=True)


def overwritten(workdir: Path, config: Mapping[str, Any] | ConfigDict) -> bool:
    """Whether a run of this config has overwritten the workdir and was then stopped or killed.

    It goes on then: a machine that starts the same command again, --overwrite and all, must not begin anew.

    Args:
      workdir: the folder.
      config: the resolved config, nested.

    Returns:
      Whether.
    """
    try:
        return (workdir / _OVERWRITTEN).read_bytes() == _as_text(config).encode()
    except (FileNotFoundError, IsADirectoryError):
        return False


def forget_overwritten(workdir: Path) -> None:
    """The run has ended by itself, well or not: the next --overwrite is meant anew.

    Args:
      workdir: the folder.
    """
    (workdir / _OVERWRITTEN).unlink(missing_ok=True)
    remote = remote_of(workdir)
    if remote is not None:
        (remote / _OVERWRITTEN).unlink(missing_ok=True)


def _as_text(config: Mapping[str, Any] | ConfigDict) -> str:
    return ConfigDict(config).to_json_best_effort(sort_keys=True)


def _can_change(name: str, states: Mapping[str, str]) -> bool:
    """Whether a field, "config.a.b", may differ from what the phases in the workdir began with."""
    _, section, *rest = name.split(".")
    if {section, *rest[-1:]} & set(_OF_THE_MACHINE):
        return True
    # A section that has a phase's name concerns that phase alone.
    return section in PHASES and name != "config.ppo.seed" and states[section] != "finished"


def lock_workdir(workdir: Path) -> BaseFileLock:
    """Keeps other runs out of the workdir, as long as this process lives.

    Args:
      workdir: the folder; is made.

    Returns:
      The lock.

    Raises:
      WorkdirError: another run writes to it.
    """
    lock = FileLock(workdir / _LOCK)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout as error:
        raise WorkdirError(
            f"{workdir}: another run writes to it (it holds {workdir / _LOCK}). Wait for its end, or take another "
            "--workdir."
        ) from error
    except OSError as error:
        raise WorkdirError(
            f"{workdir} cannot be written ({error.strerror}); take another --workdir, or change its owner or its mount."
        ) from error
    except NotImplementedError:
        logging.warning("%s is on a file system without locks: see to it that no other run writes to it.", workdir)
    return lock


def is_locked(workdir: Path) -> bool:
    """Whether a run on this machine writes to a workdir.

    Args:
      workdir: the folder; nothing is made there.

    Returns:
      Whether.
    """
    if not (workdir / _LOCK).exists():
        return False
    lock = FileLock(workdir / _LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return True
    except (OSError, NotImplementedError):  # who may not write, or has no locks, cannot ask
        return False
    lock.release()
    return False


def check_shared(workdir: Path) -> None:
    """Raises where this process does not see what process 0 writes.

    Args:
      workdir: its folder, which process 0 has made.

    Raises:
      WorkdirError: the workdir is this machine's own.
    """
    if (workdir / "config.json").is_file():
        return
    raise WorkdirError(
        f"{workdir} is not the folder that process 0 writes to, and all processes write their parts of checkpoints "
        "there: take a folder on a file system that all machines share, or a bucket (gs://)."
    )


def _paths(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in config.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _paths(value, f"{prefix}{name}.")


def _differences(before: Any, now: Any, where: str = "config") -> Any:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted(before.keys() | now.keys()):
            if where != "config" or name not in _FREE:
                yield from _differences(before.get(name), now.get(name), f"{where}.{name}")
    elif before != now:
        yield where, f"{where} was {before!r} and is {now!r}"


def status(workdir: Path, phase: str) -> str:
    """How far a phase has come in this workdir.

    Args:
      workdir: the folder.
      phase: its name.

    Returns:
      "new", "finished", "interrupted" (it has a checkpoint to go on from), or "partial" (it has a model alone).
    """
    folder = workdir / phase
    try:
        if read_object(folder / "summary.json").get("finished") is True:
            return "finished"
    except (FileNotFoundError, NotADirectoryError):
        pass
    except JSONFileError as error:
        logging.warning("%s is not what this program writes (%s); the phase does not count as finished.", folder, error)
    if any(path.name.isdigit() for path in folder.glob("checkpoints/*")):
        return "interrupted"
    return "partial" if (folder / "model").exists() else "new"


def check_overwrite(workdir: Path, phases: Iterable[str]) -> None:
    """Whether all that --overwrite would delete was written by this program.

    Args:
      workdir: the folder.
      phases: to repeat.

    Raises:
      WorkdirError: a phase's folder holds something else.
    """
    for phase in phases:
        try:
            check_deletable(workdir / phase, checkpoints_of(workdir / phase))
        except ManifestError as error:
            raise WorkdirError(
                f"--overwrite deletes only what this program wrote: {error}. Move it away, or take another --workdir."
            ) from error
