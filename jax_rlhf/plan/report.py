"""What a plan says: memory against the device's, what is sent, and how long it takes at least."""

import collections
import dataclasses
import math
import re
import time
from typing import Any

import jax

from jax_rlhf.plan.abstract import Program
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
        traffic=program.decode_bytes,
        collectives=sent,
        seconds=_bounds(flops, program.decode_bytes, sent, topology),
        compile_seconds=time.perf_counter() - started,
        failure=failure,
    )


def device_bytes(tree: Any) -> float:
    """Bytes of a device's shards.

    Args:
      tree: `jax.ShapeDtypeStruct`s with shardings.

    Returns:
      Bytes.
    """
    return float(
        sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
            if leaf.sharding.memory_kind != "pinned_host"
        )
    )


def _no_room(error: Exception, program: Program) -> tuple[str, float]:
    """What XLA for TPU says when a program does not fit by itself: why, and the bytes of temporaries."""
    text = str(error)
    temporaries = re.search(r"HLO temporaries \(([\d.]+)([GMK])\)", text)
    used = re.search(r"Used ([\d.]+)([GMK]) of", text)
    if "RESOURCE_EXHAUSTED" not in text or not (temporaries or used):
        raise error
    number, unit = (temporaries or used).groups()
    size = float(number) * {"G": GIB, "M": 2**20, "K": 2**10}[unit]
    if temporaries is None:  # arguments are in it
        size -= device_bytes([leaf for leaf in jax.tree.leaves(program.arguments) if _is_shape(leaf)])
    return text.splitlines()[0], max(0.0, size)


def _is_shape(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def _bounds(flops: float, traffic: float, sent: tuple[Collective, ...], topology: Topology) -> dict[str, float]:
    chip = topology.chip
    bounds = {"products": flops / chip.flops, "memory": traffic / chip.bandwidth, "links": 0.0, "network": 0.0}
    for one in sent:
        size = one.count * one.bytes
        if one.near > 1:
            bounds["links"] += size / topology.link
        if one.near < one.group:  # what comes over the network, the near ones share; links carry it on
            bounds["network"] += size / one.near / chip.network
    return bounds


def by_kind(sent: tuple[Collective, ...]) -> dict[str, tuple[int, float]]:
    """Collectives added up.

    Args:
      sent: of a program.

    Returns:
      kind → (how many, bytes that a device receives).
    """
    count, size = collections.Counter(), collections.Counter()
    for one in sent:
        count[one.kind] += one.count
        size[one.kind] += one.count * one.bytes
    return {kind: (count[kind], size[kind]) for kind in sorted(count)}


def as_table(accounts: list[Account], topology: Topology, forms: str) -> str:
    """The plan for people.

    Args:
      accounts: of all programs.
      topology: what they were compiled for.
      forms: the mesh and the rollout mesh, in words.

    Returns:
      Lines.
    """
    gib = lambda size: f"{size / GIB:8.2f}"  # noqa: E731
    memory = topology.chip.memory
    lines = [
        f"{topology.name}: {len(topology.devices)} × {topology.chip.name}, {memory / GIB:.1f} GiB each. {forms}",
        "Compiled ahead of time, not run: what the compiler reserves, not a measurement. GiB per device:",
        "",
        f"{'program':<26}{'parameters':>11}{'optimizer':>11}{'batch':>8}{'temporary':>10}{'peak':>8}   fits?",
    ]
    for one in accounts:
        spare = (one.memory - one.peak) / GIB
        verdict = f"yes, {spare:.1f} GiB to spare" if one.fits else f"NO, {-spare:.1f} GiB too much"
        if one.measured is not None:
            verdict += f"; measured, at most until then: {one.measured / GIB:.2f}"
        parts = (one.parameters, one.optimizer)
        lines.append(
            f"{one.phase + ' ' + one.name:<26}"
            + "".join(f"{size / GIB:11.2f}" for size in parts)
            + f"{gib(one.batch)}{one.temporaries / GIB:10.2f}{gib(one.peak)}   {verdict}"
        )
    lines += ["", f"{'sent':<26}{'kind':<20}{'count':>9}{'GiB per device':>16}"]
    for one in accounts:
        for kind, (count, size) in by_kind(one.collectives).items():
            lines.append(f"{one.phase + ' ' + one.name:<26}{kind:<20}{count:9,d}{size / GIB:16.2f}")
    names = ("products", "memory", "links", "network")
    lines += [
        "",
        "Lower bounds of the time, from data sheets (all else takes time too): seconds per call",
        f"{'program':<26}{'TFLOP':>9}" + "".join(f"{name:>10}" for name in names) + "   bound by",
    ]
    for one in accounts:
        most = max(one.seconds, key=one.seconds.get)
        times = "".join(f"{one.seconds[name]:10.3f}" for name in names)
        lines.append(f"{one.phase + ' ' + one.name:<26}{one.flops / 1e12:9.1f}{times}   {most}")
    return "\n".join(lines)


def as_json(accounts: list[Account], topology: Topology) -> dict[str, Any]:
    """The plan for machines.

    Args:
      accounts: of all programs.
      topology: what they were compiled for.

    Returns:
      What `json.dumps` takes: bytes, FLOPs and seconds, of a device.
    """
    rows = []
    for one in accounts:
        row = dataclasses.asdict(one) | {"fits": one.fits}
        kinds = by_kind(one.collectives)
        row["collectives"] = {kind: {"count": count, "bytes": size} for kind, (count, size) in kinds.items()}
        rows.append(row)
    return {"topology": topology.name, "devices": len(topology.devices), "chip": topology.chip.name, "programs": rows}
