"""A run's folder: where each phase finds the former's result, and whether it is this config's folder at all."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jax_rlhf.phases.config import RunConfig

_FREE = ("phases", "log")  # may differ from run to run in one workdir


class WorkdirError(ValueError):
    """The workdir is not this run's, or lacks what a phase needs; the message says how to mend it."""


def open_workdir(
    workdir: Path, config: Mapping[str, Any] | ConfigDict, phases: tuple[str, ...], *, overwrite: bool
) -> None:
    """Makes the workdir and writes the resolved config there, or checks that it is the same as before.

    Args:
      workdir: the folder.
      config: the resolved config, nested.
      phases: those to run.
      overwrite: what these phases left there before is deleted.

    Raises:
      WorkdirError: the folder belongs to another config; says which fields differ.
    """
    wanted = json.loads(ConfigDict(config).to_json_best_effort())
    file = workdir / "config.json"
    if file.is_file() and not overwrite:
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise WorkdirError(f"{file} is not JSON ({error}); take another --workdir, or --overwrite.") from error
        changed = list(_differences(before, wanted))
        if changed:
            raise WorkdirError(
                f"{workdir} belongs to a run of another config: {'; '.join(changed[:8])}. Take another --workdir "
                "(earlier results are found with --config.sft_model_path and --config.reward.path), or --overwrite to "
                f"repeat {', '.join(phases)} here."
            )
    workdir.mkdir(parents=True, exist_ok=True)
    if overwrite:
        for phase in phases:
            shutil.rmtree(workdir / phase, ignore_errors=True)
    file.write_text(json.dumps(wanted, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_shared(config: RunConfig, workdir: Path) -> None:
    """Raises where this process does not see what process 0 writes, and will have to.

    Args:
      config: the run's.
      workdir: its folder, which process 0 has made.

    Raises:
      WorkdirError: a phase will read the former's model, and the workdir is this machine's own.
    """
    if (workdir / "config.json").is_file() or len(config.phases) == 1:
        return
    raise WorkdirError(
        f"{workdir} is not the folder that process 0 writes to, and each phase reads the former's model there: take a "
        "folder on a file system that all machines share, or run the phases one by one."
    )


def _differences(before: Any, now: Any, where: str = "config") -> Any:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted(before.keys() | now.keys()):
            if where != "config" or name not in _FREE:
                yield from _differences(before.get(name), now.get(name), f"{where}.{name}")
    elif before != now:
        yield f"{where} was {before!r} and is {now!r}"


def status(workdir: Path, phase: str) -> str:
    """How far a phase has come in this workdir.

    Args:
      workdir: the folder.
      phase: its name.

    Returns:
      "new", "finished" or "interrupted".
    """
    try:
        summary = json.loads((workdir / phase / "summary.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "interrupted" if (workdir / phase / "model").exists() else "new"
    except ValueError:
        return "interrupted"
    return "finished" if summary.get("finished") else "interrupted"


def sft_model(config: RunConfig, workdir: Path) -> str:
    """The SFT policy.

    Args:
      config: the run's.
      workdir: its folder.

    Returns:
      A path or hub id.

    Raises:
      WorkdirError: there is none.
    """
    if config.sft_model_path is not None:
        return config.sft_model_path
    return _result(
        workdir,
        "sft",
        "--config.sft_model_path=… names another SFT model; to go without the SFT phase, "
        f"--config.sft_model_path={config.model.path or 'CHECKPOINT'}",
    )


def reward_model(config: RunConfig, workdir: Path) -> str | None:
    """The reward model of PPO.

    Args:
      config: the run's.
      workdir: its folder.

    Returns:
      A path or hub id; None where only functions score.

    Raises:
      WorkdirError: there is neither.
    """
    if config.reward.path is not None:
        return config.reward.path
    if config.ppo.reward_functions and status(workdir, "reward") == "new":
        return None
    return _result(
        workdir,
        "reward",
        "--config.reward.path=… names another reward model; "
        "--config.ppo.reward_functions=package.module:function scores by a Python function",
    )


def _result(workdir: Path, phase: str, mend: str) -> str:
    state = status(workdir, phase)
    if state == "new":
        raise WorkdirError(
            f"{workdir / phase / 'model'} is missing: run the {phase} phase first (it is one of "
            f"config.phases), or: {mend}."
        )
    if state == "interrupted":
        raise WorkdirError(
            f"{workdir / phase} was interrupted: run it again with --overwrite; or take it as it is, "
            f"with a path: {mend}."
        )
    return str(workdir / phase / "model")
