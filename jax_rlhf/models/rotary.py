"""Rotary position embeddings, with the frequency scalings of public checkpoints."""

import dataclasses
import math
import numbers
from typing import Literal

import chex
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Float32, Float64, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotary:
    """A rotary embedding of query and key heads.

    The first `dim` dimensions of a head (rounded up to pairs) are rotated, the rest are unchanged.

    Attributes:
      theta: θ, the base of the frequencies.
      dim: number of rotated dimensions per head.
      kind: how frequencies are scaled for contexts longer than the original training length.
      factor: scaling factor of the context length (linear, llama3, yarn).
      original_max_positions: the original training length, in tokens (llama3, yarn, longrope).
      low_freq_factor, high_freq_factor: llama3's band between unscaled and scaled frequencies.
      beta_fast, beta_slow, truncate: yarn's band, in rotations over the original length; `truncate` rounds it outwards.
      attention_factor: factor on cos and sin (yarn, longrope).
      short_factor, long_factor: longrope's divisors of the frequencies, for rows within and beyond the original length.

    Source: Su et al. 2021 (RoFormer); linear: Chen et al. 2023 (Position Interpolation); yarn: Peng et al. 2023;
    longrope: Ding et al. 2024; llama3: Llama 3.1's model card and `transformers.modeling_rope_utils`.
    """

    theta: float
    dim: int
    kind: Literal["default", "linear", "llama3", "yarn", "longrope"] = "default"
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        positive = ("theta", "dim", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow")
        for name in (*positive, "attention_factor"):
            value = getattr(self, name)
            # pyright does not know that numbers.Real can be compared.
            if not isinstance(value, numbers.Real) or not 0 < value < math.inf:  # pyright: ignore[reportOperatorIssue]
                raise ValueError(f"rotary embedding: {name}={value!r} must be a number above 0.")


def frequencies(rotary: Rotary, *, long: bool = False) -> Float64[np.ndarray, "pairs"]:
    """Angular frequencies of the ⌈dim / 2⌉ rotated pairs, in radians per token.

    Without scaling, ω_i = θ^(−2i / dim).

    Args:
      rotary: the rotary embedding.
      long: use longrope's divisors for rows beyond the original length.
    """
    exponents = np.arange(0, rotary.dim, 2, dtype=np.float64) / rotary.dim
    plain = rotary.theta**-exponents
    match rotary.kind:
        case "default":
            return plain
        case "linear":
            return plain / rotary.factor
        case "llama3":
            return _llama3_frequencies(rotary, plain)
        case "yarn":
            return _yarn_frequencies(rotary, plain)
        case "longrope":
            return plain / np.asarray(rotary.long_factor if long else rotary.short_factor)
    raise ValueError(f"unknown rotary kind {rotary.kind!r}")


def _llama3_frequencies(rotary: Rotary, plain: Float64[np.ndarray, "pairs"]) -> Float64[np.ndarray, "pairs"]:
    # Wavelengths much shorter than the original length are unscaled, long ones are scaled, those between are blended.
    wavelength = 2 * math.pi / plain
    low_wavelength = rotary.original_max_positions / rotary.low_freq_factor
    high_wavelength = rotary.original_max_positions / rotary.high_freq_factor
    smooth = (rotary.original_max_positions / wavelength - rotary.low_freq_factor) / (
        rotary.high_freq_factor - rotary.low_freq_factor
    )
    blended = (1 - smooth) * plain / rotary.factor + smooth * plain
    scaled = np.where(wavelength > low_wavelength, plain / rotary.factor, plain)
    between = (wavelength <= low_wavelength) & (wavelength >= high_wavelength)
    return np.where(between, blended, scaled)


def _yarn_frequencies(rotary: Rotary, plain: Float64[np.ndarray, "pairs"]) -> Float64[np.ndarray, "pairs"]:
    def dimension_of(rotations: float) -> float:
        # The index of the pair that makes `rotations` rotations over the original length.
        wavelength_over_2pi = rotary.original_max_positions / (rotations * 2 * math.pi)
        return rotary.dim * math.log(wavelength_over_2pi) / (2 * math.log(rotary.theta))

    low, high = dimension_of(rotary.beta_fast), dimension_of(rotary.beta_slow)
    if rotary.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary.dim - 1)
    if low == high:
        high += 0.001  # as in the paper's code: avoids a division by 0 in the ramp
    ramp = np.clip((np.arange(plain.size) - low) / (high - low), 0, 1)
    return plain / rotary.factor * ramp + plain * (1 - ramp)


def rotary_angles(
    rotary: Rotary, positions: Int[Array, "B T"]
) -> tuple[Float32[Array, "B T 1 pairs"], Float32[Array, "B T 1 pairs"]]:
    """(cos, sin) of position · frequency for all pairs, times `attention_factor`; axis 2 broadcasts over heads.

    With longrope, a row that extends beyond the original length uses the long divisors at all its positions. (When
    decoding, keys cached before that point keep the short divisors, as in transformers.)
    """
    chex.assert_rank(positions, 2)
    frequency = jnp.asarray(frequencies(rotary), jnp.float32)  # [pairs]
    if rotary.kind == "longrope":
        beyond = jnp.max(positions, axis=1, keepdims=True) + 1 > rotary.original_max_positions  # [B, 1]
        long = jnp.asarray(frequencies(rotary, long=True), jnp.float32)
        frequency = jnp.where(beyond[..., None], long, frequency)  # [B, 1, pairs]
    angles = positions[..., None].astype(jnp.float32) * frequency  # [B, T, pairs]
    angles = angles[:, :, None, :]  # [B, T, 1, pairs]
    return jnp.cos(angles) * rotary.attention_factor, jnp.sin(angles) * rotary.attention_factor


def rotate(
    x: Float[Array, "B T heads head_dim"], cos: Float32[Array, "B T 1 pairs"], sin: Float32[Array, "B T 1 pairs"]
) -> Float[Array, "B T heads head_dim"]:
    """Rotates each pair (x_i, x_{i+pairs}) of a head by its angle; dimensions from 2 · pairs on are unchanged.

    Args:
      x: queries or keys.
      cos, sin: from `rotary_angles`.

    Returns:
      The rotated heads, in x's dtype.
    """
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([rotated, rest], axis=-1) if rest.shape[-1] else rotated
