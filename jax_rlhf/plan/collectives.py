"""Finds the collectives of a compiled program in its HLO text.

A collective inside a loop counts once per iteration. The length of a scan is in its condition, and a loop over tokens
counts as if all tokens were sampled. Bytes are those that a device receives in a ring of n devices: (n − 1)/n of the
result for an all-gather, (n − 1)/n of the operand for a reduce-scatter, the sum of both for an all-reduce, (n − 1)/n
for an all-to-all, and all bytes for a permutation.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import cast

import numpy as np

from jax_rlhf.sampling import loop_turns

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w*|c\d+)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations|async_computation)=\{?(%[\w.\-]+(?:, ?%[\w.\-]+)*)"
)
_INTEGER = re.compile(r"s32\[\](?:\{[^}]*\})? constant\((\d+)\)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: one of `KINDS`.
      count: the number of times that it runs.
      bytes: bytes that a device receives each time.
      group: the number of devices that take part in it.
      local_group: the number of these that are in the same slice or machine; `group` if all are.
      source: `op_name` of the operation of the program from which XLA made it.
    """

    kind: str
    count: int
    bytes: float
    group: int
    local_group: int
    source: str


@dataclasses.dataclass
class _Computation:
    lines: list[tuple[str, str, str]]  # (result type, operation, the rest)


def collectives(hlo: str, *, devices: int, devices_per_machine: int | None = None) -> list[Collective]:
    """The collectives of a compiled program.

    Args:
      hlo: `compiled.as_text()`.
      devices: the number of devices of the program.
      devices_per_machine: the number of devices that share fast links, a slice or a machine; None = all.

    Returns:
      One entry per instruction.
    """
    computations, entry = _parse(hlo)
    return list(_walk(computations, entry, 1, (devices, devices_per_machine or devices)))


def _parse(hlo: str) -> tuple[dict[str, _Computation], str]:
    computations, entry, current = {}, "", None
    for line in hlo.splitlines():
        if (start := _COMPUTATION.match(line)) is not None:
            current = computations[start[1]] = _Computation([])
            entry = start[1] if line.startswith("ENTRY") else entry
        elif current is not None and (instruction := _INSTRUCTION.match(line)) is not None:
            current.lines.append(cast(tuple[str, str, str], instruction.groups()[1:]))
    return computations, entry


def _walk(
    computations: dict[str, _Computation], name: str, times: int, devices: tuple[int, int]
) -> Iterator[Collective]:
    for result, operation, rest in computations[name].lines:
        kind = operation.removesuffix("-start")
        if kind in KINDS:
            # A TPU's reduce-scatter is an all-reduce inside a computation of that name.
            scatters = kind == "all-reduce" and name.startswith("all-reduce-scatter")
            keywords = {"started": operation.endswith("-start"), "of_operands": scatters}
            yield _collective("reduce-scatter" if scatters else kind, result, rest, times, devices, **keywords)
            continue
        called = [part.strip(" %") for match in _CALLED.findall(rest) for part in match.split(",")]
        turns = 1
        if operation == "while":
            condition = re.search(r"condition=%?([\w.\-]+)", rest)
            assert condition is not None, "a loop has a condition"
            turns = _turns(computations, condition[1], rest)
        for callee in called:
            if callee in computations and not (kind == "reduce" or operation.endswith("-done")):
                yield from _walk(computations, callee, times * turns, devices)


def _turns(computations: dict[str, _Computation], condition: str, rest: str) -> int:
    trip_count = re.search(r"known_trip_count[^\d]*(\d+)", rest)
    if trip_count:
        return int(trip_count[1])
    name = re.search(r'op_name="([^"]*)"', rest)
    over_tokens = loop_turns(name[1]) if name else None
    if over_tokens is not None:
        return over_tokens
    bounds = [int(number) for number in _constants(computations, condition)]
    return max(bounds, default=1)


def _constants(computations: dict[str, _Computation], name: str) -> Iterator[str]:
    for result, operation, rest in computations[name].lines:
        yield from _INTEGER.findall(f"{result} {operation}({rest}")
        for match in _CALLED.findall(rest):
            for part in match.split(","):
                if part.strip(" %") in computations:
                    yield from _constants(computations, part.strip(" %"))


def _collective(
    kind: str, result: str, rest: str, times: int, devices: tuple[int, int], *, started: bool, of_operands: bool
) -> Collective:
    group, local_group = _group(rest, *devices)
    sizes = [_bytes(*shape) for shape in _SHAPE.findall(result)]
    share, whole = (group - 1) / group, sum(sizes)
    if kind == "collective-permute":
        whole = sizes[0]
    elif started and len(sizes) > 1 and kind != "all-reduce":  # (operands, results)
        whole = max(sum(sizes[: len(sizes) // 2]), sum(sizes[len(sizes) // 2 :]))
    elif kind == "reduce-scatter" and not of_operands:
        whole *= group
    received = whole * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share)
    source = re.search(r'op_name="([^"]*)"', rest)
    return Collective(kind, times, received, group, local_group, source[1] if source else "")


def _group(rest: str, devices: int, devices_per_machine: int) -> tuple[int, int]:
    """(devices that take part, those of them in the same slice or machine as the first)."""
    pairs = re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", rest)
    if pairs:
        ends = [tuple(map(int, pair.split(","))) for pair in re.findall(r"\{(\d+,\d+)\}", pairs[1])]
        crosses = any(source // devices_per_machine != target // devices_per_machine for source, target in ends)
        return 2, 1 if crosses else 2
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    axes = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{([^}]*)\}", rest
    )
    if listed:
        members = np.array(_numbers(listed[1]))
    elif iota:
        members = _in_order(iota[3], iota[4]).reshape(int(iota[1]), -1)[0]
    elif axes:
        sizes, along = dict(re.findall(r"'(\w+)'=(\d+)", axes[1])), re.findall(r"'(\w+)'", axes[4])
        shape = [int(size) for size in sizes.values()]
        order = _in_order(axes[2] or ",".join(map(str, shape)), axes[3]).reshape(shape)
        members = order[tuple(slice(None) if axis in along else 0 for axis in sizes)].reshape(-1)
    else:
        return devices, min(devices, devices_per_machine)
    return len(members), int(np.sum(members // devices_per_machine == members[0] // devices_per_machine))


def _in_order(shape: str, transposed: str | None) -> np.ndarray:
    """Indices of devices from XLA's notation, such as [2,4]T(1,0)."""
    order = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return order.transpose(_numbers(transposed)) if transposed else order


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _bytes(dtype: str, shape: str) -> int:
    bits = 8 if dtype == "pred" else int(re.sub(r"^f8.*", "f8", dtype).lstrip("bsufc"))
    return math.prod(int(size) for size in shape.split(",") if size) * bits // 8
