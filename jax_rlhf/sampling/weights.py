"""Training parameters → rollout parameters: in the compute dtype, in the rollout layout, unstacked where that pays.

Training cuts weights over `fsdp` and gathers a layer at a time, which a step over a whole batch pays for once. A step
of decoding would pay as much for one token per row; so sampling has a layout of its own, and this is where one becomes
the other, inside the program that samples.
"""

from typing import Any

import jax
from jax import Array
from jax.sharding import PartitionSpec
from jaxtyping import Float

from jax_rlhf.models import NORM_AXES, Decoder, DecoderConfig, logical_axes, unstack_layers
from jax_rlhf.models.decoder import Params
from jax_rlhf.parallel import Layout, constrained, reshard_steps, rollout_layout


def sampling_layout(config: DecoderConfig) -> Layout | None:
    """Where a model samples.

    Args:
      config: the model's, with its training layout.

    Returns:
      The layout; None for one device.
    """
    if config.layout is None:
        return None
    return rollout_layout(config.layout, (config.num_kv_heads, config.num_heads, config.intermediate_size))


def reshard(model: Decoder, params: Any, axes: Any) -> tuple[Decoder, Any]:
    """Parameters in the compute dtype and the rollout layout, to be called under `jit`.

    Args:
      model: as it trains.
      params: its parameters, whole or in parts.
      axes: `logical_axes` of the model, in the same tree.

    Returns:
      The model in the rollout layout, and its parameters there.
    """
    layout = sampling_layout(model.config)
    steps = [None]
    if layout is not None and model.config.layout is not None:
        steps = reshard_steps(model.config.layout, layout)

    def move(spec: PartitionSpec, leaf: Float[Array, "..."]) -> Float[Array, "..."]:
        leaf = leaf if spec in NORM_AXES else leaf.astype(model.config.dtype)
        for step in steps:
            leaf = constrained(leaf, step, *spec)
        return leaf

    params = jax.tree.map(move, axes, params, is_leaf=lambda x: isinstance(x, PartitionSpec))
    config = model.config.replace(layout=layout)
    if config.platform == "gpu" and layout != model.config.layout:
        config = config.replace(attention="xla")  # for the prefill: JAX has cuDNN's only in programs of a single mesh
    return model.clone(config=config), params


def decodes_unrolled(config: DecoderConfig) -> bool:
    """Whether a step of decoding runs over unrolled layers, of arrays of their own.

    Scanned layers are slices of stacked arrays. XLA for CPUs and GPUs copies each slice, kernels and cache, before the
    product that reads it; for TPUs it reads the slice in the product, and the loop is a fraction of the program.

    Args:
      config: the model's.

    Returns:
      True on CPUs and GPUs.
    """
    return config.platform != "tpu"


def rollout_form(model: Decoder, params: Params) -> tuple[Decoder, Params]:
    """The form that decodes fastest: in the rollout layout, its layers unrolled or scanned.

    Args:
      model: scanned or unrolled.
      params: its parameters.

    Returns:
      (model, params) that compute the same.
    """
    model, params = reshard(model, params, logical_axes(model))
    if not model.scan_layers or not decodes_unrolled(model.config):
        return model, params
    return model.clone(scan_layers=False), unstack_layers(params, model.config.num_layers)
