"""Matrix products of a traced program, counted from shapes: XLA's own count takes a scanned body once."""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr


def product_flops(jaxpr: ClosedJaxpr | Jaxpr, *, loop_turns: int = 1) -> float:
    """Floating-point operations of all matrix products, what remat computes again included.

    2 · batch · rows · columns · contracted each; a scan's body as often as it is long, of a conditional the dearer
    branch, a loop over tokens to its end.

    Args:
      jaxpr: of the traced program.
      loop_turns: turns of a `while_loop`, whose number the program does not say.

    Returns:
      FLOPs of all devices together.
    """
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    total = 0.0
    for equation in jaxpr.eqns:
        name, inner = equation.primitive.name, list(_inner(equation.params))
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
        elif name == "cond":
            total += max(product_flops(branch, loop_turns=loop_turns) for branch in inner)
        else:
            turns = {"scan": equation.params.get("length", 1), "while": loop_turns}.get(name, 1)
            total += turns * sum(product_flops(part, loop_turns=loop_turns) for part in inner)
    return total


def _inner(params: dict[str, Any]) -> Iterator[ClosedJaxpr | Jaxpr]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr | Jaxpr):
                yield item
