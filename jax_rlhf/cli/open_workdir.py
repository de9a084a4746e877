"""Opens a workdir for a run: writes its settings there, or compares them with those of the run that is there."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jax_rlhf.config import run_config
from jax_rlhf.data.config import PHASES
from jax_rlhf.io.durable import sync, write_json, write_text
from jax_rlhf.io.json_files import JSONFileError, read_object
from jax_rlhf.runtime.notes import last_notes
from jax_rlhf.runtime.remote import checkpoints_of, delete, remote_of, upload
from jax_rlhf.runtime.workdir import CONFIG_FILE, WorkdirError, check_overwrite, status
from jax_rlhf.settings import new_name

_OVERWRITTEN = "overwritten.json"  # the config of a run with --overwrite that has not ended yet
# Fields that may differ between runs in one workdir.
_UNCHECKED_FIELDS = ("phases", "log", "checkpoint", "watchdog", "max_bad_steps", "debug")
# Fields that may differ on other hardware, since results are equal except for rounding.
_HARDWARE_FIELDS = ("mesh", "rollout_mesh", "remat", "attention", "dtype", "offload", "prefetch")


def open_workdir(
    workdir: Path,
    config: Mapping[str, Any] | ConfigDict,
    phases: tuple[str, ...],
    *,
    overwrite: bool,
    accept_changes: bool = False,
) -> list[str]:
    """Creates the workdir and writes the config there, or checks that the run that is there can continue with it.

    The settings of a phase may change until it is finished. Model, data and seed belong to the whole run.

    Args:
      workdir: the folder.
      config: the resolved config, nested.
      phases: the phases to run.
      overwrite: delete what these phases wrote there before.
      accept_changes: accept any change.

    Returns:
      The accepted changes, one line each.

    Raises:
      WorkdirError: the run there has other settings. The message names the fields that differ.
    """
    wanted = json.loads(_as_config_dict(config).to_json_best_effort())
    changed: dict[str, str] = {}
    states = {phase: status(workdir, phase) for phase in PHASES}
    messages = []
    # If no phase has written anything, an earlier start failed, and there is no run to compare with.
    if not overwrite and set(states.values()) != {"new"}:
        lost, changed = _changes(workdir, config, wanted, accept_changes=accept_changes)
        messages = [lost] if lost else []
        refused = [line for name, line in changed.items() if not _can_change(name, states)]
        if refused and not accept_changes:
            raise WorkdirError(
                f"{workdir} belongs to a run with other settings: {'; '.join(refused[:8])}. {lost}Take another "
                "--workdir (earlier results are found with --config.sft_model_path and --config.reward_model.path), "
                f"--overwrite to repeat {', '.join(phases)} here, or --accept_changes to continue with the changes."
            )
    workdir.mkdir(parents=True, exist_ok=True)
    if overwrite:
        check_overwrite(workdir, phases)  # again, since the workdir is locked only now
        for phase in phases:
            delete(workdir, phase)
    write_json(workdir / CONFIG_FILE, wanted)
    sync(workdir.parent)
    if overwrite:  # everything is deleted
        write_text(workdir / _OVERWRITTEN, _as_text(config))
    upload(workdir)
    return [*messages, *changed.values()]


def _changes(
    workdir: Path, config: Mapping[str, Any] | ConfigDict, wanted: dict[str, Any], *, accept_changes: bool
) -> tuple[str, dict[str, str]]:
    """(a message if config.json is lost, the differences from the run's settings: field → line)."""
    file = workdir / CONFIG_FILE
    try:
        before = read_object(file)
        why = "" if before.keys() >= wanted.keys() else "it lacks settings"
    except FileNotFoundError:
        before, why = {}, "it is missing"
    except JSONFileError as error:
        before, why = {}, str(error)
    earlier = _of_earlier_version(file, before, accept_changes=accept_changes)
    if earlier:
        return earlier, {}
    if not why:
        return "", dict(_differences(before, wanted))
    for phase in reversed(PHASES):
        found = last_notes(checkpoints_of(workdir / phase))
        if found is not None:
            step, notes = found
            checkpoint = f"{checkpoints_of(workdir / phase)}/{step}"
            earlier = _of_earlier_version(checkpoint, notes["config"], accept_changes=accept_changes)
            if earlier:
                return earlier, {}
            now = json.loads(json.dumps(dataclasses.asdict(run_config(config))))
            lost = (
                f"{file} was lost ({why}); settings were compared with those in {phase}'s checkpoint of step {step}. "
            )
            return lost, dict(_differences(notes["config"], now))
    if not accept_changes:
        raise WorkdirError(
            f"{file} is lost ({why}), and no checkpoint has the settings of this run. Restore it from a copy, or "
            "continue with the given settings: --accept_changes."
        )
    return f"{file} was lost ({why}); the given settings are used. ", {}


def _of_earlier_version(source: Path | str, settings: Mapping[str, Any], *, accept_changes: bool) -> str:
    """A message if the settings have names of an earlier version; else empty."""
    former = next((path for path in _paths(settings) if new_name(path)), None)
    if former is None:
        return ""
    what = f"{source} is of an earlier version of this program, in which config.{new_name(former)} was config.{former}"
    if not accept_changes:
        raise WorkdirError(
            f"{what}. Take another --workdir (its models are found with --config.sft_model_path and "
            "--config.reward_model.path), finish the run with that version, or continue with the given "
            "settings: --accept_changes."
        )
    return f"{what}; the given settings are used. "


def _can_change(name: str, states: Mapping[str, str]) -> bool:
    """Whether a field, "config.a.b", may differ from what the phases in the workdir were started with."""
    _, section, *rest = name.split(".")
    if {section, *rest[-1:]} & set(_HARDWARE_FIELDS):
        return True
    # A section named after a phase concerns only that phase.
    return section in PHASES and name != "config.ppo.seed" and states[section] != "finished"


def _paths(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in config.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _paths(value, f"{prefix}{name}.")


def _differences(before: Any, now: Any, where: str = "config") -> Any:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted(before.keys() | now.keys()):
            if where != "config" or name not in _UNCHECKED_FIELDS:
                yield from _differences(before.get(name), now.get(name), f"{where}.{name}")
    elif before != now:
        yield where, f"{where} was {before!r} and is {now!r}"


def forget_failed_start(workdir: Path) -> None:
    """Deletes the config again if no phase has written anything.

    Args:
      workdir: the folder.
    """
    if any(status(workdir, phase) != "new" for phase in PHASES):
        return
    (workdir / CONFIG_FILE).unlink(missing_ok=True)
    remote = remote_of(workdir)
    if remote is not None:
        (remote / CONFIG_FILE).unlink(missing_ok=True)


def overwritten(workdir: Path, config: Mapping[str, Any] | ConfigDict) -> bool:
    """Whether a run with this config has already overwritten the workdir, and was then stopped or killed.

    It continues then. A machine that restarts the same command, with --overwrite in it, must not delete its results.

    Args:
      workdir: the folder.
      config: the resolved config, nested.
    """
    try:
        return (workdir / _OVERWRITTEN).read_bytes() == _as_text(config).encode()
    except (FileNotFoundError, IsADirectoryError):
        return False


def forget_overwritten(workdir: Path) -> None:
    """Marks the run as ended, with or without an error, so that the next --overwrite deletes again.

    Args:
      workdir: the folder.
    """
    (workdir / _OVERWRITTEN).unlink(missing_ok=True)
    remote = remote_of(workdir)
    if remote is not None:
        (remote / _OVERWRITTEN).unlink(missing_ok=True)


def _as_text(config: Mapping[str, Any] | ConfigDict) -> str:
    return _as_config_dict(config).to_json_best_effort(sort_keys=True)


def _as_config_dict(config: Mapping[str, Any] | ConfigDict) -> ConfigDict:
    return config if isinstance(config, ConfigDict) else ConfigDict(dict(config))
