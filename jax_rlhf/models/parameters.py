"""A decoder's parameters as a tree: new ones, their shapes, axes and dtypes, and their forms for decoding."""

import functools
import operator

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jax.sharding import PartitionSpec
from jaxtyping import PRNGKeyArray

from jax_rlhf.models.decoder import Decoder, Params

NORM_AXES = PartitionSpec("norm"), PartitionSpec("layers", "norm")  # norm parameters: used in float32, never cast


def _init(model: Decoder, key: PRNGKeyArray) -> Params:
    return dict(model.init(key, jnp.zeros((1, 1), jnp.int32)))["params"]


def init_params(model: Decoder, key: PRNGKeyArray) -> Params:
    """New float32 parameters: normal with standard deviation 0.02, norms 1, biases 0, a scalar head as `head_init`."""
    return meta.unbox(jax.jit(_init, static_argnums=0)(model, key))


def abstract_params(model: Decoder) -> Params:
    """The result of `init_params` as `jax.ShapeDtypeStruct`s, without allocating it."""
    return meta.unbox(_boxed(model))  # pyright: ignore[reportArgumentType]  # flax makes it hashable


def logical_axes(model: Decoder) -> Params:
    """The logical names of each parameter's axes ("vocab", "embed", "heads", "mlp", "layers", …).

    Returns:
      A nested dict of `jax.sharding.PartitionSpec`; `parallel/layout.py` maps the names to mesh axes.
    """
    return nn.get_partition_spec(_boxed(model))  # pyright: ignore[reportArgumentType]  # flax makes it hashable


def compute_dtypes(model: Decoder) -> Params:
    """The dtype that each parameter is used in: the config's, but float32 for norms and a scalar head.

    Trainable parameters are stored in float32; frozen ones need no wider dtype than this.
    """
    axes = logical_axes(model)
    dtypes = jax.tree.map(
        lambda spec: jnp.dtype(jnp.float32) if spec in NORM_AXES else jnp.dtype(model.config.dtype),
        axes,
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )
    if "scalar_head" in dtypes:
        dtypes["scalar_head"] = {"kernel": jnp.dtype(jnp.float32)}
    return dtypes


@functools.lru_cache(maxsize=64)  # tracing `init` takes 0.1 s; callers do not change the result
def _boxed(model: Decoder) -> Params:
    return jax.eval_shape(lambda key: _init(model, key), jax.random.key(0))


def unstack_layers(params: Params, num_layers: int) -> Params:
    """Converts parameters of a scanned model to those of the same model with unrolled layers.

    Args:
      params: with "layers", leaves [L, ...].
      num_layers: L.

    Returns:
      With "layers_0", … instead, leaves [...]; other entries are unchanged.
    """
    rest = {name: value for name, value in params.items() if name != "layers"}
    layers = [jax.tree.map(operator.itemgetter(index), params["layers"]) for index in range(num_layers)]
    return rest | {f"layers_{index}": layer for index, layer in enumerate(layers)}


def kernels_by_output(params: Params) -> Params:
    """Transposes the kernels in the layers of an unrolled decoder, for decoding on CPU (see `products.py`).

    A decode step of a model with 97 million parameters takes 20 ms instead of 30 ms with 8 rows, and 90 ms instead of
    125 ms with 64 rows (2 cores, Zen 4).

    Args:
      params: with "layers_0", ….

    Returns:
      The parameters with "kernel_by_output" [*outputs, *inputs] instead of each "kernel" in the layers.
    """
    transposed: dict[tuple[str, ...], Array] = {}
    leaves: dict[tuple[str, ...], Array] = flatten_dict(params)  # pyright: ignore[reportAssignmentType]
    for path, leaf in leaves.items():
        if path[0].startswith("layers_") and path[-1] == "kernel":
            count = 2 if path[-2] == "out" else 1  # attention's output sums over heads and head_dim
            transposed[(*path[:-1], "kernel_by_output")] = leaf.transpose(*range(count, leaf.ndim), *range(count))
        else:
            transposed[path] = leaf
    return unflatten_dict(transposed)
