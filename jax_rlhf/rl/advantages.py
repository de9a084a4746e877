"""Advantages and returns from rewards and values."""

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jax_rlhf.rl.types import AnyArray

_Pair = tuple[Float[Array, "*batch"], Float[Array, "*batch"]]


def gae(
    rewards: Float[AnyArray, "*batch T"],
    values: Float[AnyArray, "*batch T"],
    mask: Bool[AnyArray, "*batch T"],
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: Float[AnyArray, "*batch"] | None = None,
) -> tuple[Float[Array, "*batch T"], Float[Array, "*batch T"]]:
    """Generalized advantage estimation over the real steps of each row.

    δ_t = r_t + γ V_{t+1} − V_t,   A_t = δ_t + γλ A_{t+1},   returns_t = A_t + V_t

    where t + 1 is the next real step: steps whose mask is False are skipped. After the last real step, V is `bootstrap`
    and A is 0.

    Args:
      rewards: r, in reward units.
      values: V of the state before each step, in reward units.
      mask: True = real step.
      gamma: discount per step.
      lam: λ, from 0 (one-step) to 1 (Monte Carlo).
      bootstrap: value of the state after the last real step; None = 0, for episodes that ended.

    Returns:
      (advantages, returns), 0 where the mask is False. Advantages are not whitened.

    Source: Schulman et al. 2015, "High-Dimensional Continuous Control Using GAE", eq. 16.
    """
    rewards, values = jnp.asarray(rewards), jnp.asarray(values)
    bootstrap = jnp.zeros(values.shape[:-1], values.dtype) if bootstrap is None else jnp.asarray(bootstrap)  # [...]
    chex.assert_type([rewards, values, mask, bootstrap], [float, float, bool, float])
    chex.assert_equal_shape([rewards, values, mask])
    chex.assert_shape(bootstrap, values.shape[:-1])

    def step(
        carry: _Pair, inputs: tuple[Float[Array, "*batch"], Float[Array, "*batch"], Bool[Array, "*batch"]]
    ) -> tuple[_Pair, Float[Array, "*batch"]]:
        next_advantage, next_value = carry
        reward, value, real = inputs
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        carry = jnp.where(real, advantage, next_advantage), jnp.where(real, value, next_value)
        return carry, jnp.where(real, advantage, 0)

    # [T, ...] each
    rewards_first, values_first, mask_first = (jnp.moveaxis(x, -1, 0) for x in (rewards, values, jnp.asarray(mask)))
    start = jnp.zeros_like(bootstrap), bootstrap
    _, advantages = jax.lax.scan(step, start, (rewards_first, values_first, mask_first), reverse=True)
    advantages = jnp.moveaxis(advantages, 0, -1)  # [..., T]
    return advantages, jnp.where(mask, advantages + values, 0)
