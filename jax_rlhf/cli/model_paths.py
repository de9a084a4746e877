"""The models that a phase starts from: results of earlier phases, or other checkpoints; and whether they have
changed."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

from jax_rlhf.config import RunConfig
from jax_rlhf.data.config import PHASES
from jax_rlhf.io.paths import local_path
from jax_rlhf.runtime.manifest import ManifestError, check_model, listed_models
from jax_rlhf.runtime.workdir import WorkdirError, status


def sft_model(config: RunConfig, workdir: Path) -> str:
    """The path or hub id of the SFT policy.

    Raises:
      WorkdirError: the workdir has no finished SFT phase, and config.sft_model_path is not set.
    """
    if config.sft_model_path is not None:
        return config.sft_model_path
    return _result(
        config,
        workdir,
        "sft",
        "--config.sft_model_path=… names another SFT model; to skip the SFT phase, "
        f"--config.sft_model_path={config.model.path or 'CHECKPOINT'}",
    )


def reward_model(config: RunConfig, workdir: Path) -> str | None:
    """The path or hub id of the reward model of PPO; None if only reward functions are used.

    Raises:
      WorkdirError: there is neither a reward model nor a reward function, or the reward phase did not finish.
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
        "--config.ppo.reward.functions=FILE.py:function scores with a Python function",
    )


def _result(config: RunConfig, workdir: Path, phase: str, remedy: str) -> str:
    """The path of the model that a phase of this workdir exported."""
    state = status(workdir, phase)
    if state == "new":
        both = ",".join(name for name in PHASES if name == phase or name in config.phases)
        raise WorkdirError(
            f"{workdir / phase / 'model'} is missing: run the {phase} phase first (--config.phases={both} does both), "
            f"or: {remedy}."
        )
    if state != "finished":
        again = "run it again" if state == "interrupted" else "repeat it with --overwrite"
        raise WorkdirError(
            f"{workdir / phase} did not finish: {again} (--config.phases={phase}), or use another model: {remedy}."
        )
    return str(workdir / phase / "model")


class Input(NamedTuple):
    """A checkpoint that a phase starts from, the head that it is loaded with, and what it is used for."""

    path: str
    revision: str | None
    head: Literal["lm", "scalar"]
    use: str


def inputs_of(config: RunConfig, workdir: Path, phases: list[str]) -> list[Input]:
    """The checkpoints that phases start from.

    Args:
      config: the settings of the run.
      workdir: its folder.
      phases: the phases that will run, or the one that is about to start.

    Raises:
      WorkdirError: the model of a phase that is not among them is missing.
    """
    training, policy, found = config.reward, config.model.revision, []
    if "sft" in phases:
        found.append(Input(config.model.required_path(), policy, "lm", "policy"))
    elif "ppo" in phases or ("reward" in phases and (not training.start_from or training.normalize_rows > 0)):
        found.append(Input(sft_model(config, workdir), policy, "lm", "policy"))
    if "reward" in phases and training.start_from:
        found.append(Input(training.start_from, training.start_revision, "scalar", "start"))
    if "ppo" not in phases:
        return found
    path = config.reward_model.path if "reward" in phases else reward_model(config, workdir)
    if path:
        found.append(Input(path, config.reward_model.revision, "scalar", "reward"))
    if config.critic.path:
        found.append(Input(config.critic.path, config.critic.revision, "scalar", "critic"))
    if config.reference.path:
        found.append(Input(config.reference.path, config.reference.revision, "lm", "reference"))
    return found


def check_inputs(config: RunConfig, workdir: Path, phase: str, *, accept_changes: bool) -> list[str]:
    """Checks that the models which a phase starts from are as they were exported.

    Args:
      config: the settings of the run.
      workdir: its folder.
      phase: the phase that is about to start.
      accept_changes: continue with models that have changed.

    Returns:
      The accepted changes, one line each.

    Raises:
      WorkdirError: a model is not what an earlier phase exported.
    """
    paths = [checkpoint.path for checkpoint in inputs_of(config, workdir, [phase])]
    return check_exported(paths, workdir, accept_changes=accept_changes)


def check_exported(paths: Iterable[str | None], workdir: Path, *, accept_changes: bool) -> list[str]:
    """Checks that models which phases of this run or another one exported have not changed since.

    Args:
      paths: of checkpoints. Hub ids, None, and folders that no phase exported are not checked.
      workdir: the folder of this run. Its models must be listed in a manifest.
      accept_changes: continue with models that have changed.

    Returns:
      The accepted changes, one line each.

    Raises:
      WorkdirError: a model is not what a phase exported.
    """
    phase_folders, accepted = [(workdir / phase).resolve() for phase in PHASES], []
    for path in dict.fromkeys(path for path in paths if path is not None):
        folder = local_path(path)
        # The folder may be a link, or its path may contain one.
        for model in (folder.parent.resolve() / folder.name, folder.resolve()) if folder.is_dir() else ():
            try:
                if model.parent in phase_folders or _is_listed(model):
                    check_model(model)
            except ManifestError as error:
                what = f"{folder} is not what the {model.parent.name} phase exported: {error}"
                if not accept_changes:
                    raise WorkdirError(
                        f"{what}. Restore it from a copy, or use it as it is with --accept_changes."
                    ) from error
                accepted.append(f"{what} (--accept_changes)")
            if model == folder.resolve():
                break
    return accepted


def _is_listed(model: Path) -> bool:
    try:
        return model.name in listed_models(model.parent)
    except ManifestError:  # a manifest.json of another program
        return False
