"""Converts training parameters for the rollout: to the compute dtype, the rollout layout, and unrolled layers.

Training shards weights over `fsdp` and gathers one layer at a time, a cost shared by all tokens of a batch. A decode
step would pay the same cost for one token per row. Sampling therefore has a layout of its own; the functions here
convert the parameters inside the program that samples.
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
    """The rollout layout of a model with this training config; None for one device."""
    if config.layout is None:
        return None
    return rollout_layout(config.layout, (config.num_kv_heads, config.num_heads, config.intermediate_size))


def reshard(model: Decoder, params: Any, axes: Any) -> tuple[Decoder, Any]:
    """Converts parameters to the compute dtype and the rollout layout, under `jit`.

    Args:
      model: with its training config.
      params: its parameters, as one tree or split.
      axes: `logical_axes` of the model, in a tree of the same structure.

    Returns:
      (model, parameters) in the rollout layout.
    """
    layout = sampling_layout(model.config)
    steps = [None]
    if layout is not None and model.config.layout is not None:
        steps = reshard_steps(layout)

    def move(spec: PartitionSpec, leaf: Float[Array, "..."]) -> Float[Array, "..."]:
        leaf = leaf if spec in NORM_AXES else leaf.astype(model.config.dtype)
        for step in steps:
            leaf = constrained(leaf, step, *spec)
        return leaf

    params = jax.tree.map(move, axes, params, is_leaf=lambda x: isinstance(x, PartitionSpec))
    config = model.config.replace(layout=layout)
    if config.platform == "gpu" and layout != model.config.layout:
        config = config.replace(attention="xla")  # for prefill: JAX supports cuDNN only in programs with a single mesh
    return model.clone(config=config), params


def decodes_unrolled(config: DecoderConfig) -> bool:
    """Whether decoding uses unrolled layers, each with its own arrays: True on CPU and GPU.

    Scanned layers are slices of stacked arrays. On CPU and GPU, XLA copies each slice of kernels and cache before the
    product that reads it. On TPU the product reads the slice directly, and a scan gives a much smaller program.
    """
    return config.platform != "tpu"


def rollout_form(model: Decoder, params: Params) -> tuple[Decoder, Params]:
    """Converts a model to the form that decodes fastest: in the rollout layout, with layers unrolled or scanned.

    Args:
      model: scanned or unrolled.
      params: its parameters.

    Returns:
      An equivalent (model, params).
    """
    model, params = reshard(model, params, logical_axes(model))
    if not model.scan_layers or not decodes_unrolled(model.config):
        return model, params
    return model.clone(scan_layers=False), unstack_layers(params, model.config.num_layers)
