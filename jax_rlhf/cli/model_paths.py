"""The models that a phase takes: a former phase's result, or another checkpoint; as they were exported."""

from collections.abc import Iterable
from pathlib import Path

from jax_rlhf.config import RunConfig
from jax_rlhf.data.config import PHASES
from jax_rlhf.io.paths import local_path
from jax_rlhf.runtime.manifest import ManifestError, check_model, listed_models
from jax_rlhf.runtime.workdir import WorkdirError, status


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
        config,
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
    if config.reward_model.path is not None:
        return config.reward_model.path
    if config.ppo.reward.functions and status(workdir, "reward") == "new":
        return None
    return _result(
        config,
        workdir,
        "reward",
        "--config.reward_model.path=… names another reward model; "
        "--config.ppo.reward.functions=FILE.py:function scores by a Python function",
    )


def _result(config: RunConfig, workdir: Path, phase: str, mend: str) -> str:
    state = status(workdir, phase)
    if state == "new":
        both = ",".join(name for name in PHASES if name == phase or name in config.phases)
        raise WorkdirError(
            f"{workdir / phase / 'model'} is missing: run the {phase} phase first (--config.phases={both} does both), "
            f"or: {mend}."
        )
    if state != "finished":
        again = "run it again" if state == "interrupted" else "repeat it with --overwrite"
        raise WorkdirError(
            f"{workdir / phase} did not finish: {again} (config.phases={phase}), or take it as it is: {mend}."
        )
    return str(workdir / phase / "model")


def check_inputs(config: RunConfig, workdir: Path, phase: str, *, accept_changes: bool) -> list[str]:
    """Whether the models that a phase takes from this workdir are as they were exported.

    Args:
      config: the run's.
      workdir: its folder.
      phase: that begins.
      accept_changes: go on with another one.

    Returns:
      What differs and is accepted, a line each.

    Raises:
      WorkdirError: a model is not what the former phase exported.
    """
    training, paths = config.reward, [config.model.path] if phase == "sft" else []
    if phase == "reward":
        paths.append(training.start_from)
    if phase == "ppo" or (phase == "reward" and (not training.start_from or training.normalize_rows > 0)):
        paths.append(sft_model(config, workdir))
    if phase == "ppo":
        paths += [reward_model(config, workdir), config.reference.path, config.critic.path]
    return check_exported(paths, workdir, accept_changes=accept_changes)


def check_exported(paths: Iterable[str | None], workdir: Path, *, accept_changes: bool) -> list[str]:
    """Whether models that phases have exported, of this run or another one, are as they were then.

    Args:
      paths: of checkpoints; hub ids, None, and folders that no phase has exported are not looked at.
      workdir: this run's, whose models a manifest must list.
      accept_changes: go on with another one.

    Returns:
      What differs and is accepted, a line each.

    Raises:
      WorkdirError: a model is not what a phase exported.
    """
    ours, said = [(workdir / phase).resolve() for phase in PHASES], []
    for path in dict.fromkeys(path for path in paths if path is not None):
        folder = local_path(path)
        # A folder may be a link, or be reached by one.
        for place in (folder.parent.resolve() / folder.name, folder.resolve()) if folder.is_dir() else ():
            try:
                if place.parent in ours or _is_listed(place):
                    check_model(place)
            except ManifestError as error:
                what = f"{folder} is not what the {place.parent.name} phase exported: {error}"
                if not accept_changes:
                    raise WorkdirError(
                        f"{what}. Put it back from a copy; or take it as it is, with --accept_changes."
                    ) from error
                said.append(f"{what} (--accept_changes)")
            if place == folder.resolve():
                break
    return said


def _is_listed(model: Path) -> bool:
    try:
        return model.name in listed_models(model.parent)
    except ManifestError:  # other programs have files of that name too
        return False
