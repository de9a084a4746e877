"""All programs of a run, for simulated devices; they are the jitted functions of the phases themselves."""

from jax_rlhf.config import RunConfig
from jax_rlhf.parallel import Layout
from jax_rlhf.plan.abstract import Program
from jax_rlhf.plan.ppo_programs import ppo_programs
from jax_rlhf.plan.supervised_programs import reward_programs, sft_programs


def programs_of(config: RunConfig, layout: Layout) -> list[Program]:
    """All programs of a run, in the order of the phases.

    Raises:
      ValueError: the mesh does not divide a size, or the shape of a model is unknown.
    """
    made = []
    for phase in config.phases:
        made += {"sft": sft_programs, "reward": reward_programs, "ppo": ppo_programs}[phase](config, layout)
    return made
