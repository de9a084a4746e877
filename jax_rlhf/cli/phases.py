"""Runs one phase: passes its settings and the models of earlier phases to its recipe."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

from jax_rlhf.cli.model_paths import reward_model, sft_model
from jax_rlhf.config import RunConfig
from jax_rlhf.parallel import create_layout
from jax_rlhf.ppo import train as ppo
from jax_rlhf.ppo.resolve import batch_plan
from jax_rlhf.reward import train as reward
from jax_rlhf.reward.calibration import Responses
from jax_rlhf.runtime.phase import Phase
from jax_rlhf.runtime.preemption import StopSignals
from jax_rlhf.sft import train as sft

Recipe = Callable[..., dict[str, float]]


def run_phase(
    name: str, config: RunConfig, workdir: Path, *, stop: StopSignals | None = None, accept_changes: bool = False
) -> dict[str, float]:
    """Runs a phase, from its last checkpoint if there is one.

    Args:
      name: "sft", "reward" or "ppo".
      config: the run's settings.
      workdir: its folder; the phase writes to <workdir>/<name>.
      stop: the run's signal handlers; None = the phase installs its own.
      accept_changes: continue although data, tokenizer or frozen parameters have changed since the last checkpoint.

    Returns:
      The phase's results, also in summary.json.

    Raises:
      ValueError, FileNotFoundError, CheckpointError: a setting, the data or a checkpoint cannot be used.
      WorkdirError: the model of an earlier phase is missing.
      RewardError: a reward function failed.
      Stopped: the run was asked to stop. It can continue.
    """
    recipe = {"sft": _sft, "reward": _reward, "ppo": _ppo}[name](config, workdir)
    layout = create_layout(config.mesh, config.rollout_mesh)
    with Phase(workdir / name, config.phase, stop, accept_changes=accept_changes) as phase:
        return recipe(phase, layout=layout, seed=config.seed)


def _sft(config: RunConfig, workdir: Path) -> Recipe:
    del workdir
    eos_ids = config.ppo.sampling.eos_ids
    return functools.partial(sft.run, config=config.sft, model=config.model, data=config.data, eos_ids=eos_ids)


def _reward(config: RunConfig, workdir: Path) -> Recipe:
    settings, ppo_settings, model, responses = config.reward, config.ppo, config.model, None
    if settings.start_from:
        model = dataclasses.replace(model, path=settings.start_from, revision=settings.start_revision)
    else:
        model = dataclasses.replace(model, path=sft_model(config, workdir))
    if settings.normalize_rows:
        responses = Responses(
            policy=dataclasses.replace(config.model, path=sft_model(config, workdir)),
            count=settings.normalize_rows,
            sampling=ppo_settings.sampling,
            batch_plan=functools.partial(batch_plan, ppo_settings),
            eval_rows=config.eval_rows_of("ppo"),
        )
    return functools.partial(
        reward.run,
        config=settings,
        model=model,
        policy=config.model,
        responses=responses,
        data=config.data_of("reward"),
        eos_ids=ppo_settings.sampling.eos_ids,
    )


def _ppo(config: RunConfig, workdir: Path) -> Recipe:
    roles = {
        "model": dataclasses.replace(config.model, path=sft_model(config, workdir)),
        "reference": config.reference,
        "critic": config.critic,
        "reward_model": dataclasses.replace(config.reward_model, path=reward_model(config, workdir)),
    }
    return functools.partial(ppo.run, config=config.ppo, roles=roles, data=config.data)
