"""What each program takes: memory against the device's, what is sent, and how long it takes at least."""

import dataclasses
import re
import time
from typing import Any

import jax

from jax_rlhf.plan.abstract import Program, device_bytes
from jax_rlhf.plan.bounds import bounds
from jax_rlhf.plan.chips import GIB
from jax_rlhf.plan.collectives import Collective, collectives
from jax_rlhf.plan.flops import product_flops
from jax_rlhf.plan.topology import Topology


@dataclasses.dataclass(frozen=True)
class Account:
    """One program on one device; bytes and FLOPs are of a device.

    Attributes:
      phase, name: the program.
      parameters, optimizer: bytes that lie there for the whole phase.
      batch: bytes of what the program is called with besides.
      temporaries: bytes that the compiler needs while it runs, results included where they take no argument's place.
      peak: the sum of these.
      memory: bytes that the device has.
      flops: matrix products, remat's included.
      traffic: bytes of parameters and cache that decoding reads; 0 for the others.
      collectives: what it sends.
      seconds: the bounds of the time, by what bounds it.
      compile_seconds: how long it took to compile here.
      measured: bytes that a device held at most when it was run; None = it was not.
      failure: the compiler's words where it found no room; temporaries are then what it says that it lacks.
    """

    phase: str
    name: str
    parameters: float
    optimizer: float
    batch: float
    temporaries: float
    peak: float
    memory: float
    flops: float
    traffic: float
    collectives: tuple[Collective, ...]
    seconds: dict[str, float]
    compile_seconds: float
    measured: float | None = None
    failure: str | None = None

    @property
    def fits(self) -> bool:
        """Whether the device has the memory."""
        return self.peak <= self.memory


def account(program: Program, topology: Topology) -> Account:
    """Compiles a program, and reads off what it takes.

    Args:
      program: the program.
      topology: what to compile for.

    Returns:
      The account.
    """
    started = time.perf_counter()
    traced = program.function.trace(*program.arguments)
    flops = product_flops(traced.jaxpr) / len(topology.devices)
    parameters, optimizer = (device_bytes(program.resident[part]) for part in ("parameters", "optimizer"))
    batch, failure, sent = device_bytes(program.passing), None, ()
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        failure, temporaries = _no_room(error, program)
    else:
        memory = compiled.memory_analysis()
        temporaries = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        sent = tuple(collectives(compiled.as_text(), devices=len(topology.devices), near=topology.group))
    return Account(
        phase=program.phase,
        name=program.name,
        parameters=parameters,
        optimizer=optimizer,
        batch=batch,
        temporaries=temporaries,
        peak=parameters + optimizer + batch + temporaries,
        memory=topology.chip.memory,
        flops=flops,
        traffic=program.decode,
        collectives=sent,
        seconds=bounds(flops, program.decode, sent, topology),
        compile_seconds=time.perf_counter() - started,
        failure=failure,
    )


def _no_room(error: Exception, program: Program) -> tuple[str, float]:
    """What XLA for TPU says when a program does not fit by itself: why, and the bytes of temporaries."""
    text = str(error)
    temporaries = re.search(r"HLO temporaries \(([\d.]+)([GMK])\)", text)
    used = re.search(r"Used ([\d.]+)([GMK]) of", text)
    found = temporaries or used
    if "RESOURCE_EXHAUSTED" not in text or found is None:
        raise error
    number, unit = found.groups()
    size = float(number) * {"G": GIB, "M": 2**20, "K": 2**10}[unit]
    if temporaries is None:  # arguments are in it
        size -= device_bytes([leaf for leaf in jax.tree.leaves(program.arguments) if _is_shape(leaf)])
    return text.splitlines()[0], max(0.0, size)


def _is_shape(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)
