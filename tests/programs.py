"""Reads traced programs."""

from collections.abc import Iterator

import jax.extend

from jax_rlhf.plan.collectives import _COMPUTATION


def equations(jaxpr: jax.extend.core.Jaxpr) -> Iterator[jax.extend.core.JaxprEqn]:
    """All equations of a program, including those of inner programs."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


def computations_of(hlo: str) -> dict[str, list[str]]:
    """Name → lines of each computation of a compiled program; `hlo` is `compiled.as_text()`."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in hlo.splitlines():
        if (start := _COMPUTATION.match(line)) is not None:
            lines = found[start[1]] = []
        elif line.startswith("  "):
            lines.append(line)
    return found
