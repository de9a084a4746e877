"""RLHF on a mesh, in JAX: supervised fine-tuning, reward model, PPO."""

from jax_rlhf.hub import CheckpointError, Pretrained, load_pretrained, save_pretrained

__all__ = ["CheckpointError", "Pretrained", "load_pretrained", "save_pretrained"]
