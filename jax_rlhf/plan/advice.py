"""Searches for settings with which a run fits; each is compiled before it is recommended."""

import copy
import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from jax_rlhf.config import RunConfig, run_config
from jax_rlhf.plan.all_programs import programs_of
from jax_rlhf.plan.chips import GIB
from jax_rlhf.plan.report import Account, account
from jax_rlhf.plan.topology import Topology, layout_on


@dataclasses.dataclass(frozen=True)
class Advice:
    """A setting that was tried.

    Attributes:
      program: "phase name", the phase and the program's name.
      change: field → value; empty = no further setting helps.
      before, after: peak bytes of a device, with all changes so far.
      fits: whether the program fits after the change.
    """

    program: str
    change: dict[str, Any]
    before: float
    after: float
    fits: bool

    def __str__(self) -> str:
        if not self.change:
            reached = f"{self.program}: {self.after / GIB:.1f} GiB is the lowest peak that was reached"
            return f"{reached}; use more devices, or set model.trainable_layers"
        fields = " ".join(f"--config.{name}={value}" for name, value in self.change.items())
        verdict = "fits" if self.fits else "does not fit yet"
        return f"{self.program}: {fields}  {self.before / GIB:.1f} → {self.after / GIB:.1f} GiB, {verdict}"

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return dataclasses.asdict(self)


def advice(config: ConfigDict, topology: Topology, accounts: list[Account]) -> Iterator[Advice]:
    """For each program that does not fit, tries changes that lower its peak, and keeps them until it fits.

    Args:
      config: the run's settings, with its flags.
      topology: the hardware.
      accounts: the accounts of the unchanged run.

    Yields:
      Each change that helps, ordered by its cost, so that changes without effect on results come first. If a program
      does not fit with any of them, an `Advice` without a change follows.
    """
    config, changed = copy.deepcopy(config), False
    for one in accounts:
        now = _replan(config, topology, one) if changed else one
        if now is None or now.fits:
            continue
        for change in _changes(run_config(config), now, len(topology.devices)):
            trial = copy.deepcopy(config)
            with trial.unlocked():
                trial.update_from_flattened_dict(change)
            print(f"trying {one.phase} {one.name} with {change}", file=sys.stderr, flush=True)
            after = _replan(trial, topology, one)
            if after is None or after.peak > 0.99 * now.peak:
                continue
            config, changed = trial, True
            yield Advice(f"{one.phase} {one.name}", change, now.peak, after.peak, after.fits)
            now = after
            if after.fits:
                break
        if not now.fits:
            yield Advice(f"{one.phase} {one.name}", {}, now.peak, now.peak, False)


def _replan(config: ConfigDict, topology: Topology, one: Account) -> Account | None:
    """The account of the same program with other settings; None if the settings are invalid."""
    try:
        settings = dataclasses.replace(run_config(config), phases=(one.phase,))
        layout = layout_on(topology, settings)
        programs = programs_of(settings, layout)
    except ValueError:
        return None
    return next((account(program, topology) for program in programs if program.name == one.name), None)


def _changes(settings: RunConfig, one: Account, devices: int) -> Iterator[dict[str, Any]]:
    """Changes to try: first those that only affect speed, then those that change what is computed."""
    for role in ("model", "critic", "reward_model", "reference"):
        if getattr(settings, role).remat in ("none", "dots"):
            yield {f"{role}.remat": "full"}
    roles = ("model", "critic", "reward_model", "reference")
    plain = [role for role in roles if getattr(settings, role).attention in (None, "xla")]
    if plain:
        yield {f"{role}.attention": "flash" for role in plain}
    mesh = settings.mesh
    if mesh.data != 1:
        yield {"mesh.data": 1, "mesh.fsdp": -1}
    rows = {
        "sft": settings.data.sft_batch_size,
        "reward": settings.data.reward_batch_size,
        "ppo": settings.data.ppo_batch_size // settings.ppo.num_minibatches,
    }[one.phase]
    if one.name not in ("rollout", "responses", "export"):
        micro = getattr(settings, one.phase).microbatch_size or rows
        while micro > 1:
            micro //= 2
            yield {f"{one.phase}.microbatch_size": micro}
    if one.phase == "ppo":
        yield {"reference.offload": True, "reward_model.offload": True}
    if one.name.startswith(("rollout", "responses")):
        for tensor in (2, 4, 8, 16):
            if devices % tensor == 0:
                yield {"rollout_mesh.data": -1, "rollout_mesh.fsdp": 1, "rollout_mesh.tensor": tensor}
    for tensor in (2, 4, 8):
        if tensor > mesh.tensor and devices % tensor == 0:
            yield {"mesh.tensor": tensor}
    optimizers = ("sft.optimizer",) if one.phase == "sft" else ("reward.optimizer",)
    if one.phase == "ppo":
        optimizers = ("ppo.actor.optimizer", "ppo.critic.optimizer")
    yield {f"{name}.first_moment_dtype": "bfloat16" for name in optimizers}
    if one.phase == "ppo" and one.name != "update":
        for fraction in (2, 4):
            yield {"data.ppo_batch_size": settings.data.ppo_batch_size // fraction}
