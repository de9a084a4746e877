"""The decoder: its description, its modules, its cache."""

from jax_rlhf.models.cache import KVCache, create_cache, grow_cache
from jax_rlhf.models.config import DecoderConfig
from jax_rlhf.models.decoder import (
    NORM_AXES,
    Decoder,
    abstract_params,
    compute_dtypes,
    init_params,
    kernels_by_output,
    logical_axes,
    unstack_layers,
)
from jax_rlhf.models.precision import model_jit, narrowed, traced
from jax_rlhf.models.rotary import Rotary

__all__ = [
    "NORM_AXES",
    "Decoder",
    "DecoderConfig",
    "KVCache",
    "Rotary",
    "abstract_params",
    "compute_dtypes",
    "create_cache",
    "grow_cache",
    "init_params",
    "kernels_by_output",
    "logical_axes",
    "model_jit",
    "narrowed",
    "traced",
    "unstack_layers",
]
