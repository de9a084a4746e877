"""Compiles programs, and reports their memory, communication and lower bounds of their time."""

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
    """The resources of a program; bytes and FLOPs are per device.

    Attributes:
      phase, name: the program.
      parameters, optimizer: bytes that are on the device during the whole phase.
      batch: bytes of the program's other arguments.
      temporaries: bytes that the compiler reserves while the program runs, with results that do not reuse the memory of
        an argument.
      peak: the sum of these.
      memory: bytes of the device's memory.
      flops: FLOPs of matrix products, with those that remat recomputes.
      traffic: bytes of parameters and KV cache that decoding reads; 0 for other programs.
      collectives: the program's collectives.
      seconds: resource → lower bound of the time.
      compile_seconds: the duration of compilation on this machine.
      measured: peak bytes of a device in a real run; None = not measured.
      failure: the compiler's message if the program does not fit; temporaries are then taken from that message.
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
        """Whether the peak fits into the device's memory."""
        return self.peak <= self.memory


def account(program: Program, topology: Topology) -> Account:
    """Compiles a program for a topology, and reports its resources."""
    started = time.perf_counter()
    traced = program.function.trace(*program.arguments)
    flops = product_flops(traced.jaxpr) / len(topology.devices)
    parameters, optimizer = (device_bytes(program.resident[part]) for part in ("parameters", "optimizer"))
    batch, failure, sent = device_bytes(program.transient), None, ()
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        failure, temporaries = _out_of_memory(error, program)
    else:
        memory = compiled.memory_analysis()
        temporaries = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        sent = tuple(collectives(compiled.as_text(), devices=len(topology.devices), devices_per_machine=topology.group))
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


def _out_of_memory(error: Exception, program: Program) -> tuple[str, float]:
    """(message, bytes of temporaries) from XLA's error for a program that does not fit on a TPU by itself.

    Other errors are raised again.
    """
    text = str(error)
    temporaries = re.search(r"HLO temporaries \(([\d.]+)([GMK])\)", text)
    used = re.search(r"Used ([\d.]+)([GMK]) of", text)
    found = temporaries or used
    if "RESOURCE_EXHAUSTED" not in text or found is None:
        raise error
    number, unit = found.groups()
    size = float(number) * {"G": GIB, "M": 2**20, "K": 2**10}[unit]
    if temporaries is None:  # the size includes the arguments
        size -= device_bytes([leaf for leaf in jax.tree.leaves(program.arguments) if _is_shape(leaf)])
    return text.splitlines()[0], max(0.0, size)


def _is_shape(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)
