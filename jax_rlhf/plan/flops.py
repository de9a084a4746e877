"""Counts FLOPs of matrix products in a traced program from shapes. XLA counts the body of a scan only once."""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from jax_rlhf.sampling import loop_turns

# cuDNN's attention is one operation. Its backward pass recomputes the scores, and has four more products for gradients.
_CUDNN_PRODUCTS = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}


def product_flops(jaxpr: ClosedJaxpr | Jaxpr) -> float:
    """FLOPs of all matrix products over all devices, with those that remat recomputes.

    A product has 2 · batch · rows · columns · contracted FLOPs. The body of a scan counts once per iteration, a
    conditional counts as its most expensive branch, and a loop over tokens as if all tokens were sampled. Attention
    kernels count as if they computed all pairs of tokens, as "xla" attention does, although they skip about half.

    Args:
      jaxpr: the jaxpr of the traced program.
    """
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    total = 0.0
    for equation in jaxpr.eqns:
        name, inner = equation.primitive.name, list(_inner(equation.params))
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = _shape(equation.invars[0])
            total += 2.0 * math.prod(_shape(equation.outvars[0])) * math.prod(shape[axis] for axis in contracted)
        elif name == "cond":
            total += max(product_flops(branch) for branch in inner)
        elif name in _CUDNN_PRODUCTS:
            query, key = _shape(equation.invars[0]), _shape(equation.invars[1])  # [B, T, H, head_dim]
            total += _CUDNN_PRODUCTS[name] * 2.0 * math.prod(query) * key[1]
        else:
            total += _turns(equation) * sum(product_flops(part) for part in inner)
    return total


def _turns(equation: JaxprEqn) -> int:
    params = equation.params
    if equation.primitive.name == "while":  # a loop over tokens; the iterations of other loops are unknown
        return loop_turns(str(equation.source_info.name_stack)) or 1
    if equation.primitive.name == "shard_map":  # its body is the work of one device
        return params["mesh"].size
    if equation.primitive.name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    return params.get("length", 1) if equation.primitive.name == "scan" else 1


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _inner(params: dict[str, Any]) -> Iterator[ClosedJaxpr | Jaxpr]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr | Jaxpr):
                yield item
