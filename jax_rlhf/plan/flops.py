"""Matrix products of a traced program, counted from shapes: XLA's own count takes a scanned body once."""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from jax_rlhf.sampling import loop_turns

# cuDNN's attention is one operation; backward computes the scores again, then four gradients' products.
_CUDNN_PRODUCTS = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}


def product_flops(jaxpr: ClosedJaxpr | Jaxpr) -> float:
    """Floating-point operations of all matrix products, what remat computes again included.

    2 · batch · rows · columns · contracted each; a scan's body as often as it is long, of a conditional the dearer
    branch, a loop over tokens to its end. Attention kernels count as if they looked at all pairs of tokens, as the
    plain form does; they leave out about half.

    Args:
      jaxpr: of the traced program.

    Returns:
      FLOPs of all devices together.
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
    if equation.primitive.name == "while":  # over tokens; another loop's turns the program does not say
        return loop_turns(str(equation.source_info.name_stack)) or 1
    if equation.primitive.name == "shard_map":  # its body is what one device does
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
