"""Checkpoints in and out: Hugging Face folders, hub ids, GGUF files."""

from jax_rlhf.hub.errors import CheckpointError
from jax_rlhf.hub.families import config_from_hub
from jax_rlhf.hub.pretrained import Pretrained, describe_pretrained, load_pretrained, save_pretrained

__all__ = [
    "CheckpointError",
    "Pretrained",
    "config_from_hub",
    "describe_pretrained",
    "load_pretrained",
    "save_pretrained",
]
