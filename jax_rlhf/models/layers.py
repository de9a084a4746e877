"""The building blocks of a layer: activations, projection, norm, MLP."""

import functools
import math
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jax_rlhf.models.config import DecoderConfig
from jax_rlhf.models.products import project, project_by_output
from jax_rlhf.parallel import constrained

Initializer = Callable[..., Array]
"""(random key, shape, dtype) → array."""

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": nn.silu,
    "swish": nn.silu,
    "relu": nn.relu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_new": functools.partial(nn.gelu, approximate=True),
    "gelu_fast": functools.partial(nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "tanh": jnp.tanh,
}
"""Keys are the names in Hugging Face configs."""


def partitioned(init: Initializer, axes: tuple[str | None, ...]) -> Initializer:
    """An initializer that attaches logical names to the axes of the parameter.

    Args:
      init: creates the array.
      axes: a name per axis; None for an axis that is never sharded.

    Returns:
      An initializer of a Flax box with array and names; `Module.param` unboxes the array.
    """
    return cast(Initializer, nn.with_logical_partitioning(init, axes))


normal_init = nn.initializers.normal(0.02)  # GPT-2's, and the default `initializer_range` of every family here


class Projection(nn.Module):
    """y = x · kernel (+ bias), over the last axes of x.

    Attributes:
      inputs, outputs: sizes of the input axes (summed over) and output axes, e.g. (D,) → (heads, head_dim).
      axes: logical names of the kernel's axes, inputs then outputs.
      use_bias: adds a bias of shape `outputs`.
      dtype: compute dtype.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    axes: tuple[str | None, ...]
    use_bias: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """[..., *inputs] → [..., *outputs], in `dtype`."""
        count = len(self.inputs)
        if self.has_variable("params", "kernel_by_output"):  # parameters from `kernels_by_output`
            kernel = self.get_variable("params", "kernel_by_output")
            y = project_by_output(x.astype(self.dtype), kernel.astype(self.dtype), count)
        else:
            init = partitioned(normal_init, self.axes)
            kernel = self.param("kernel", init, self.inputs + self.outputs)
            y = project(x.astype(self.dtype), kernel.astype(self.dtype), count)
        if self.use_bias:
            zeros = partitioned(nn.initializers.zeros, self.axes[count:])
            y = y + self.param("bias", zeros, self.outputs).astype(self.dtype)
        return y


class Norm(nn.Module):
    """RMS or layer norm over the last axis, computed in float32.

    rms: x / √(mean x² + ε) · w; layer: (x − mean x) / √(var x + ε) · w + b; w counts as 1 + w with `norm_plus_one`.

    Source: Zhang & Sennrich 2019; Ba et al. 2016.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """The normalised x, in x's dtype."""
        config = self.config
        y = x.astype(jnp.float32)
        if config.norm_kind == "layer":
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + config.norm_epsilon)
        if config.norm_affine:
            start = nn.initializers.zeros if config.norm_plus_one else nn.initializers.ones
            scale = self.param("scale", partitioned(start, ("norm",)), (x.shape[-1],))
            y = y * (scale.astype(jnp.float32) + float(config.norm_plus_one))
            if config.norm_kind == "layer":
                zeros = partitioned(nn.initializers.zeros, ("norm",))
                y = y + self.param("bias", zeros, (x.shape[-1],)).astype(jnp.float32)
        return y.astype(x.dtype)


class MLP(nn.Module):
    """down(act(up(x))), or down(act(gate(x)) · up(x)) where gated (Shazeer 2020, "GLU Variants")."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """The block's output, to be added to the residual stream."""
        config = self.config
        widen = functools.partial(
            Projection,
            (config.hidden_size,),
            (config.intermediate_size,),
            ("embed", "mlp"),
            config.mlp_bias,
            config.dtype,
        )
        activate = ACTIVATIONS[config.activation]
        up = widen(name="up")(x)
        hidden = activate(widen(name="gate")(x)) * up if config.gated_mlp else activate(up)  # [..., F]
        hidden = constrained(hidden, config.layout, "rows", "length", "mlp")
        narrow = Projection(
            (config.intermediate_size,),
            (config.hidden_size,),
            ("mlp", "embed"),
            config.mlp_bias,
            config.dtype,
            name="down",
        )
        return narrow(hidden)


def softcap(x: Float[Array, "*shape"], cap: float | None) -> Float[Array, "*shape"]:
    """cap · tanh(x / cap), or x if cap is None.

    Source: Gemma 2 (2024), section 2.
    """
    return x if cap is None else cap * jnp.tanh(x / cap)


def head_init(width: int) -> Initializer:
    """The initializer of a new scalar head: normal with standard deviation 1/√(width + 1); width: its input size.

    Source: Stiennon et al. 2020, "Learning to summarize from human feedback", appendix.
    """
    return nn.initializers.normal(1 / math.sqrt(width + 1))
