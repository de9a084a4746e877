"""InstructGPT's three phases, each a recipe that reads from top to bottom."""

from jax_rlhf.phases.config import RunConfig, default_config, run_config

__all__ = ["RunConfig", "default_config", "run_config"]
