"""Loads and saves checkpoints: Hugging Face folders, hub ids and GGUF files."""

from jax_rlhf.hub.checkpoint_error import CheckpointError
from jax_rlhf.hub.families import config_from_hub
from jax_rlhf.hub.pretrained import Description, Pretrained, describe_pretrained, load_pretrained, save_pretrained
from jax_rlhf.hub.tokenizer import end_ids, ids_of, other_ids

__all__ = [
    "CheckpointError",
    "Description",
    "Pretrained",
    "config_from_hub",
    "describe_pretrained",
    "end_ids",
    "ids_of",
    "load_pretrained",
    "other_ids",
    "save_pretrained",
]
