"""Abstract models, batches and programs of a run: shapes with shardings instead of arrays."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jax_rlhf.hub import Pretrained
from jax_rlhf.hub.config import ModelConfig
from jax_rlhf.hub.load_model import running
from jax_rlhf.models import Decoder, abstract_params, compute_dtypes, logical_axes
from jax_rlhf.models.decoder import Head, Params
from jax_rlhf.models.split import SplitModel, SplitParams
from jax_rlhf.parallel import Layout, padded_vocab_size, take_replicated
from jax_rlhf.plan.shapes import model_shape
from jax_rlhf.sampling import decode_stages, sampling_layout


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function of a run with its arguments.

    Attributes:
      phase, name: the phase to which it belongs, and its name there.
      function: the jitted function.
      arguments: its arguments: static values, and shapes instead of arrays.
      resident: arrays that are on the devices during the whole phase: parameters, optimizer states.
      transient: arrays that are on the devices for this program only: batches, experience.
      decode: bytes of kernels and KV cache that a device reads in loops over tokens, if all tokens are sampled; 0
        without such loops.
      layout: the layout for training.
      offloaded: parameters that are offloaded to the host's memory.
      rollout: the layout for sampling; None if it is not a rollout of PPO.
    """

    phase: str
    name: str
    function: Callable
    arguments: tuple
    resident: dict[str, Any]
    transient: Any
    layout: Layout
    decode: float = 0.0
    offloaded: Any = ()
    rollout: Layout | None = None


def abstract_model(config: ModelConfig, head: Head, layout: Layout) -> Pretrained | None:
    """The model that `load_model` would load, with shapes as parameters; None if config.path is None."""
    if config.path is None:
        return None
    decoder, stored = model_shape(config.path, config.revision)
    decoder = decoder.replace(padded_vocab_size=padded_vocab_size(decoder.vocab_size, layout), layout=layout)
    model = Decoder(running(decoder, config), head=head)
    shardings = SplitModel(model).shardings(layout).trainable
    return Pretrained(model, with_shardings(abstract_params(model), shardings, jnp.dtype(stored)))


def as_saved(pretrained: Pretrained) -> Pretrained:
    """The model with the dtypes in which one phase writes it and the next phase loads it."""
    shapes = jax.tree.map(
        lambda leaf, dtype: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding),
        pretrained.params,
        compute_dtypes(pretrained.model),
    )
    return dataclasses.replace(pretrained, params=shapes)


def with_shardings(shapes: Any, shardings: Any, dtype: Any = None) -> Any:
    """Adds shardings to shapes.

    Args:
      shapes: a tree.
      shardings: a tree of the same structure.
      dtype: of all leaves; None = the dtype of each leaf.
    """
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def replicated(layout: Layout, value: Any) -> jax.ShapeDtypeStruct:
    """The shape of an array that is replicated on all devices."""
    shape = jax.eval_shape(lambda: value)
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=layout.sharding(()))


def sharded_rows(layout: Layout, dtype: Any, *shape: int) -> Any:
    """The shape, a `jax.ShapeDtypeStruct`, of an array whose rows are sharded over `data` and `fsdp`."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding(("rows",), shape))


def token_rows(layout: Layout, rows: int, width: int) -> tuple[Any, Any]:
    """Shapes of a batch of tokens and its mask: int32[rows, width], bool[rows, width]."""
    return sharded_rows(layout, jnp.int32, rows, width), sharded_rows(layout, jnp.bool_, rows, width)


def shard_rows(tree: Any, layout: Layout) -> Any:
    """Shards the rows of each leaf of a tree of shapes, as in `sharded_rows`."""
    return jax.tree.map(lambda leaf: sharded_rows(layout, leaf.dtype, *leaf.shape), tree)


def decode_bytes(model: Decoder, rows: int, width: int, length: int) -> float:
    """Bytes of kernels and KV cache that a device reads while it decodes, in the rollout layout.

    Each step reads every kernel, and every slot of the cache of its stage. An embedding table without a tied LM head is
    only looked up, one row per token, and does not count.

    Args:
      model: the model.
      rows: B, rows of the batch.
      width: P, tokens per prompt.
      length: R, new tokens per row; all of them are sampled.

    Returns:
      Bytes of all steps.
    """
    config, layout = model.config, sampling_layout(model.config)

    def shard_size(axes: PartitionSpec | tuple[str, ...], shape: tuple[int, ...]) -> int:
        assert layout is not None  # a plan has a mesh
        return math.prod(layout.sharding(tuple(axes), shape).shard_shape(shape))

    sizes = jax.tree.map(
        lambda spec, leaf: shard_size(spec, leaf.shape),
        logical_axes(model),
        abstract_params(model),
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )
    if not config.tie_embeddings:
        sizes = {name: size for name, size in sizes.items() if name != "embedding"}
    kernels = sum(jax.tree.leaves(sizes)) * (length - 1)
    stages = decode_stages(length)
    slots = sum((end - start) * (width + end - 1) for start, end in zip((1, *stages), stages, strict=False))
    slot = config.num_layers, rows, config.num_kv_heads, config.head_dim
    cache = 2 * slots * shard_size(("layers", "rows", "kv_heads", "head_dim"), slot)  # keys and values
    return float((kernels + cache) * config.dtype.itemsize)


def joined(network: SplitModel, params: SplitParams, layout: Layout) -> tuple[Params, Params]:
    """Joins the trainable and frozen parameters of a model, as for export and for sampling after SFT.

    Returns:
      (tree of all parameters, tree of those that joining copies: all layers if only some of them are trained).
    """
    shapes = jax.eval_shape(network.join, params)
    whole = with_shardings(shapes, SplitModel(network.model).shardings(layout).trainable)
    return whole, {"layers": whole["layers"]} if "layers" in params.frozen else {}


def export_program(
    phase: str, models: Sequence[tuple[SplitModel, SplitParams]], resident: dict[str, Any], layout: Layout
) -> list[Program]:
    """The program that gathers the largest tensor of a phase's models on every device, to write it.

    Args:
      phase: the phase.
      models: the models that it exports, one after the other.
      resident: as in `Program`.
      layout: the devices.

    Returns:
      One program; none for one device.
    """
    if layout.mesh.size == 1:
        return []
    tensors = []  # (bytes, leaf, whether it is stacked, dtype in which it is saved, parameters copied by `joined`)
    for network, params in models:
        whole, made = joined(network, params, layout)
        dtypes = jax.tree.leaves(compute_dtypes(network.model))
        for (path, leaf), dtype in zip(jax.tree.leaves_with_path(whole), dtypes, strict=True):
            stacked = path[0].key == "layers"
            size = leaf.size * dtype.itemsize / (leaf.shape[0] if stacked else 1)
            tensors.append((size, leaf, stacked, dtype, made))
    _, leaf, stacked, dtype, made = max(tensors, key=lambda tensor: tensor[0])
    arguments = leaf, jax.ShapeDtypeStruct((), jnp.int32) if stacked else None, layout.sharding(()), dtype
    return [Program(phase, "export", take_replicated, arguments, resident, made, layout)]


def device_bytes(tree: Any) -> float:
    """Bytes of the shards of one device, without leaves in the host's memory.

    Args:
      tree: `jax.ShapeDtypeStruct`s with shardings.
    """
    return shard_bytes([leaf for leaf in jax.tree.leaves(tree) if leaf.sharding.memory_kind != "pinned_host"])


def shard_bytes(tree: Any) -> float:
    """Bytes of the shards of one device, in any memory.

    Args:
      tree: `jax.ShapeDtypeStruct`s with shardings.
    """
    leaves = jax.tree.leaves(tree)
    return float(sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves))
