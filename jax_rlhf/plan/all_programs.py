"""Every program of a run, those of the phases themselves, for devices that are only described."""

from jax_rlhf.config import RunConfig
from jax_rlhf.parallel import Layout
from jax_rlhf.plan.abstract import Program
from jax_rlhf.plan.ppo_programs import ppo_programs
from jax_rlhf.plan.supervised_programs import reward_programs, sft_programs


def programs_of(config: RunConfig, layout: Layout) -> list[Program]:
    """All programs of a run.

    Args:
      config: the run's settings.
      layout: the devices.

    Returns:
      The programs, by phase.

    Raises:
      ValueError: sizes that the mesh does not divide, or a model whose shape is not known.
    """
    made = []
    for phase in config.phases:
        made += {"sft": sft_programs, "reward": reward_programs, "ppo": ppo_programs}[phase](config, layout)
    return made
