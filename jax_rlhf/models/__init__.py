"""The decoder: its description, its modules, its cache."""

from jax_rlhf.models.cache import KVCache, create_cache
from jax_rlhf.models.config import DecoderConfig
from jax_rlhf.models.decoder import (
    Decoder,
    abstract_params,
    init_params,
    kernels_by_output,
    logical_axes,
    unstack_layers,
)
from jax_rlhf.models.precision import model_jit, traced
from jax_rlhf.models.rotary import Rotary

__all__ = [
    "Decoder",
    "DecoderConfig",
    "KVCache",
    "Rotary",
    "abstract_params",
    "create_cache",
    "init_params",
    "kernels_by_output",
    "logical_axes",
    "model_jit",
    "traced",
    "unstack_layers",
]
