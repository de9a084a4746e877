"""A run without its arrays: models, batches and programs as shapes with shardings."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jax_rlhf.config import RunConfig
from jax_rlhf.hub import Pretrained
from jax_rlhf.hub.model_config import ModelConfig, running
from jax_rlhf.models import Decoder, abstract_params, compute_dtypes, logical_axes
from jax_rlhf.models.decoder import Head, Params
from jax_rlhf.models.split import SplitModel, SplitParams
from jax_rlhf.parallel import Layout, padded_vocab_size, take_replicated
from jax_rlhf.plan.shapes import model_shape
from jax_rlhf.sampling import decode_stages, sampling_layout


@dataclasses.dataclass(frozen=True)
class Program:
    """One jitted function of a run, and what it is called with.

    Attributes:
      phase, name: where it belongs, and what it does.
      function: the jitted function.
      arguments: as it is called, static ones and shapes.
      resident: what lies on the devices whether this program reads it or not: parameters, optimizer states.
      passing: what lies there for this program: batches, experience.
      decode: bytes of kernels and cache that a device reads in its loops over tokens, run to their end; 0 without any.
      layout: of training.
      waiting: parameters that lie in the host's memory.
      rollout: the layout that it samples in; None where it is no rollout of PPO.
    """

    phase: str
    name: str
    function: Callable
    arguments: tuple
    resident: dict[str, Any]
    passing: Any
    layout: Layout
    decode: float = 0.0
    waiting: Any = ()
    rollout: Layout | None = None


def abstract_model(config: ModelConfig, head: Head, layout: Layout) -> Pretrained | None:
    """A model as `load_model` would load it, as shapes.

    Args:
      config: where it comes from.
      head: "lm" or "scalar".
      layout: the devices.

    Returns:
      The model; None where config.path is None.
    """
    if config.path is None:
        return None
    decoder, stored = model_shape(config.path, config.revision)
    decoder = decoder.replace(padded_vocab_size=padded_vocab_size(decoder.vocab_size, layout), layout=layout)
    model = Decoder(running(decoder, config), head=head)
    places = SplitModel(model).shardings(layout).trainable
    return Pretrained(model, placed(abstract_params(model), places, jnp.dtype(stored)))


def as_saved(pretrained: Pretrained) -> Pretrained:
    """A model as the phase that trained it writes it, and the next one loads it."""
    shapes = jax.tree.map(
        lambda leaf, dtype: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding),
        pretrained.params,
        compute_dtypes(pretrained.model),
    )
    return dataclasses.replace(pretrained, params=shapes)


def placed(shapes: Any, places: Any, dtype: Any = None) -> Any:
    """Shapes with shardings.

    Args:
      shapes: a tree.
      places: its shardings.
      dtype: of all leaves; None = each its own.

    Returns:
      The tree.
    """
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=place), shapes, places
    )


def everywhere(layout: Layout, value: Any) -> jax.ShapeDtypeStruct:
    """A value that each device has whole.

    Args:
      layout: the devices.
      value: an array.

    Returns:
      Its shape.
    """
    shape = jax.eval_shape(lambda: value)
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=layout.sharding(()))


def rows_of(layout: Layout, dtype: Any, *shape: int) -> Any:
    """An array whose rows lie on the devices along `data` and `fsdp`.

    Args:
      layout: the devices.
      dtype: of the array.
      shape: of the array.

    Returns:
      Its shape.
    """
    return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding(("rows",), shape))


def token_rows(layout: Layout, rows: int, width: int) -> tuple[Any, Any]:
    """A batch of tokens and its mask.

    Args:
      layout: the devices.
      rows: of the batch.
      width: of a row, in tokens.

    Returns:
      int32[rows, width], bool[rows, width].
    """
    return rows_of(layout, jnp.int32, rows, width), rows_of(layout, jnp.bool_, rows, width)


def in_rows(tree: Any, layout: Layout) -> Any:
    """`rows_of` each leaf.

    Args:
      tree: of shapes.
      layout: the devices.

    Returns:
      The tree.
    """
    return jax.tree.map(lambda leaf: rows_of(layout, leaf.dtype, *leaf.shape), tree)


def decode_bytes(model: Decoder, rows: int, width: int, length: int) -> float:
    """Bytes of kernels and cache that a device reads while it decodes, in the rollout layout.

    A step reads every kernel, of a table that only looks tokens up a row per token, and each slot of its stage's cache.

    Args:
      model: the model.
      rows: of the batch.
      width: P, tokens per prompt.
      length: R, new tokens per row, all of which are drawn.

    Returns:
      Bytes of all steps together.
    """
    config, layout = model.config, sampling_layout(model.config)

    def held(axes: PartitionSpec | tuple[str, ...], shape: tuple[int, ...]) -> int:
        assert layout is not None, "a plan is for a mesh"
        return math.prod(layout.sharding(tuple(axes), shape).shard_shape(shape))

    sizes = jax.tree.map(
        lambda spec, leaf: held(spec, leaf.shape),
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
    cache = 2 * slots * held(("layers", "rows", "kv_heads", "head_dim"), slot)  # keys and values
    return float((kernels + cache) * config.dtype.itemsize)


def joined(network: SplitModel, params: SplitParams, layout: Layout) -> tuple[Params, Params]:
    """A model's two parts in one tree, as it is exported, and as it answers after SFT.

    Args:
      network: the model.
      params: its parameters.
      layout: the devices.

    Returns:
      (the tree, of it what is copied: all layers, where only some of them train).
    """
    shapes = jax.eval_shape(network.join, params)
    whole = placed(shapes, SplitModel(network.model).shardings(layout).trainable)
    return whole, {"layers": whole["layers"]} if "layers" in params.frozen else {}


def export_program(
    phase: str, models: Sequence[tuple[SplitModel, SplitParams]], resident: dict[str, Any], layout: Layout
) -> list[Program]:
    """What puts the largest tensor of a phase's models together on every device, from where it is written.

    Args:
      phase: whose models they are.
      models: those that it exports, one after the other.
      resident: as in `Program`.
      layout: the devices.

    Returns:
      One program; none where there is one device.
    """
    if layout.mesh.size == 1:
        return []
    tensors = []  # (bytes, leaf, whether it is stacked, dtype in which it is saved, what is copied before)
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


def prompt_width(config: RunConfig) -> int:
    """Of a batch of prompts.

    Args:
      config: the run's settings.

    Returns:
      P, tokens.
    """
    return config.data.prompt_tokens or config.data.max_prompt_tokens


def device_bytes(tree: Any) -> float:
    """Bytes of a device's shards, without what waits in the host's memory.

    Args:
      tree: `jax.ShapeDtypeStruct`s with shardings.

    Returns:
      Bytes.
    """
    return shard_bytes([leaf for leaf in jax.tree.leaves(tree) if leaf.sharding.memory_kind != "pinned_host"])


def shard_bytes(tree: Any) -> float:
    """Bytes of a device's shards, wherever they are.

    Args:
      tree: `jax.ShapeDtypeStruct`s with shardings.

    Returns:
      Bytes.
    """
    leaves = jax.tree.leaves(tree)
    return float(sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves))
