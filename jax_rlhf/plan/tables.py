"""Formats a plan as tables and as JSON."""

import dataclasses
from typing import Any

from jax_rlhf.plan.chips import GIB
from jax_rlhf.plan.collectives import Collective
from jax_rlhf.plan.host import HostAccount
from jax_rlhf.plan.report import Account
from jax_rlhf.plan.topology import Topology

_BOUNDS = ("products", "memory", "links", "network", "latency")


def by_kind(sent: tuple[Collective, ...]) -> dict[str, dict[str, float]]:
    """Sums a program's collectives by kind.

    Returns:
      kind → "count", "far" (the number of those over the network) and "bytes" that a device receives.
    """
    kinds: dict[str, dict[str, float]] = {}
    for one in sorted(sent, key=lambda one: one.kind):
        row = kinds.setdefault(one.kind, {"count": 0, "far": 0, "bytes": 0.0})
        row["count"] += one.count
        row["far"] += one.count * (one.local_group < one.group)
        row["bytes"] += one.count * one.bytes
    return kinds


def as_table(
    accounts: list[Account], hosts: list[HostAccount], topology: Topology, meshes: str, notes: list[str]
) -> str:
    """The plan as tables.

    Args:
      accounts: of all programs.
      hosts: of all phases.
      topology: the devices for which they were compiled.
      meshes: a description of the mesh and the rollout mesh.
      notes: remarks for the user.
    """
    memory = topology.chip.memory / GIB
    lines = [
        f"{topology.name}: {len(topology.devices)} × {topology.chip.name}, {memory:.1f} GiB each. {meshes}",
        *notes,
        "Compiled ahead of time, not run: what the compiler reserves, not a measurement. GiB per device:",
    ]
    tables = _memory(accounts), _host(hosts), _sent(accounts), _times(accounts)
    return "\n".join(lines) + "".join("\n\n" + "\n".join(table) for table in tables)


def _memory(accounts: list[Account]) -> list[str]:
    lines = [f"{'program':<26}{'parameters':>11}{'optimizer':>11}{'batch':>8}{'temporary':>10}{'peak':>8}   fits?"]
    for one in accounts:
        verdict = _verdict((one.memory - one.peak) / GIB)
        if one.measured is not None:
            verdict += f"; measured, at most until then: {one.measured / GIB:.2f}"
        lines.append(
            f"{one.phase + ' ' + one.name:<26}{one.parameters / GIB:11.2f}{one.optimizer / GIB:11.2f}"
            f"{one.batch / GIB:8.2f}{one.temporaries / GIB:10.2f}{one.peak / GIB:8.2f}   {verdict}"
        )
    return lines


def _verdict(spare: float) -> str:
    return f"yes, {spare:.1f} GiB to spare" if spare >= 0 else f"NO, {-spare:.1f} GiB too much"


def _host(hosts: list[HostAccount]) -> list[str]:
    lines = [
        "GiB of a host's memory, beside the program and its data:",
        f"{'phase':<10}{'devices':>8}{'offloaded':>11}{'checkpoint':>12}{'export':>8}{'peak':>9}   fits?",
    ]
    for one in hosts:
        known = one.memory == one.memory  # False for NaN
        lines.append(
            f"{one.phase:<10}{one.devices:>8}{one.offloaded / GIB:11.2f}{one.checkpoint / GIB:12.2f}"
            f"{one.file / GIB:8.2f}{one.peak / GIB:9.2f}   "
            + (_verdict((one.memory - one.peak) / GIB) + " on Google's machines" if known else "not known")
        )
    return lines


def _sent(accounts: list[Account]) -> list[str]:
    lines = [f"{'sent':<26}{'kind':<20}{'count':>9}{'over network':>14}{'GiB per device':>16}"]
    for one in accounts:
        for kind, row in by_kind(one.collectives).items():
            name, size = f"{one.phase} {one.name}", row["bytes"] / GIB
            lines.append(f"{name:<26}{kind:<20}{row['count']:9,d}{row['far']:14,d}{size:16.2f}")
    return lines


def _times(accounts: list[Account]) -> list[str]:
    lines = [
        "Lower bounds of the time, from data sheets (all else takes time too): seconds per call. Latency is that of",
        "collectives: in decoding each waits for the one before, in training they overlap with products",
        f"{'program':<26}{'TFLOP':>9}" + "".join(f"{name:>10}" for name in _BOUNDS) + "   bound by",
    ]
    for one in accounts:
        most = max(one.seconds, key=one.seconds.__getitem__)
        times = "".join(f"{one.seconds[name]:10.3f}" for name in _BOUNDS)
        lines.append(f"{one.phase + ' ' + one.name:<26}{one.flops / 1e12:9.1f}{times}   {most}")
    return lines


def as_json(accounts: list[Account], hosts: list[HostAccount], topology: Topology, notes: list[str]) -> dict[str, Any]:
    """The plan as JSON-compatible data; arguments as for `as_table`.

    "programs" has bytes, FLOPs and seconds per device, and "hosts" has bytes per host.
    """
    rows = []
    for one in accounts:
        rows.append(dataclasses.asdict(one) | {"fits": one.fits, "collectives": by_kind(one.collectives)})
    here = {"topology": topology.name, "devices": len(topology.devices), "chip": topology.chip.name}
    host_rows = [dataclasses.asdict(one) | {"peak": one.peak, "fits": one.fits} for one in hosts]
    return here | {"notes": notes, "programs": rows, "hosts": host_rows}
