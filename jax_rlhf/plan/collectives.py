"""What a compiled program sends between devices, read from its HLO text.

A collective inside loops counts as often as they turn: a scan's length is in its condition, a loop over tokens is taken
to run to its end. Bytes are those that a device receives in a ring of n: an all-gather (n − 1)/n of its result, a
reduce-scatter (n − 1)/n of its operand, an all-reduce both, an all-to-all (n − 1)/n, a permutation all of it.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

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
      kind: of `KINDS`.
      count: how often it runs.
      bytes: that a device receives each time.
      group: devices that take part together.
      far: whether they lie in several slices or machines.
      source: the operation of the program that it serves.
    """

    kind: str
    count: int
    bytes: float
    group: int
    far: bool
    source: str


@dataclasses.dataclass
class _Computation:
    lines: list[tuple[str, str, str]]  # (result type, operation, the rest)


def collectives(hlo: str, *, loop_turns: int = 0, devices: int, near: int | None = None) -> list[Collective]:
    """The collectives of a compiled program.

    Args:
      hlo: `compiled.as_text()`.
      loop_turns: of loops whose number of turns is not in their condition.
      devices: of the program.
      near: of them, as many as links join, a slice or a machine; None = all.

    Returns:
      Each once, with how often it runs.
    """
    computations, entry = _parse(hlo)
    return list(_walk(computations, entry, 1, loop_turns, (devices, near or devices)))


def _parse(hlo: str) -> tuple[dict[str, _Computation], str]:
    computations, entry, current = {}, "", None
    for line in hlo.splitlines():
        if (start := _COMPUTATION.match(line)) is not None:
            current = computations[start[1]] = _Computation([])
            entry = start[1] if line.startswith("ENTRY") else entry
        elif current is not None and (instruction := _INSTRUCTION.match(line)) is not None:
            current.lines.append(instruction.groups()[1:])
    return computations, entry


def _walk(
    computations: dict[str, _Computation], name: str, times: int, loop_turns: int, devices: tuple[int, int]
) -> Iterator[Collective]:
    for result, operation, rest in computations[name].lines:
        kind = operation.removesuffix("-start")
        if kind in KINDS:
            yield _collective(kind, result, rest, times, devices, started=operation.endswith("-start"))
            continue
        called = [part.strip(" %") for match in _CALLED.findall(rest) for part in match.split(",")]
        turns = 1
        if operation == "while":
            condition = re.search(r"condition=%?([\w.\-]+)", rest)[1]
            turns = _turns(computations, condition, rest, loop_turns)
        for callee in called:
            if callee in computations and not (kind == "reduce" or operation.endswith("-done")):
                yield from _walk(computations, callee, times * turns, loop_turns, devices)


def _turns(computations: dict[str, _Computation], condition: str, rest: str, loop_turns: int) -> int:
    known = re.search(r"known_trip_count[^\d]*(\d+)", rest)
    if known:
        return int(known[1])
    if re.search(r'op_name="[^"]*jit\(\w+\)/while"', rest) and loop_turns:  # over tokens: it may end before
        return loop_turns
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
    kind: str, result: str, rest: str, times: int, devices: tuple[int, int], *, started: bool
) -> Collective:
    group, far = _group(rest, *devices)
    sizes = [_bytes(*shape) for shape in _SHAPE.findall(result)]
    share, whole = (group - 1) / group, sum(sizes)
    if kind == "collective-permute":
        whole = sizes[0]
    elif started and len(sizes) > 1 and kind != "all-reduce":  # (operands, results)
        whole = max(sum(sizes[: len(sizes) // 2]), sum(sizes[len(sizes) // 2 :]))
    elif kind == "reduce-scatter":
        whole *= group
    received = whole * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share)
    source = re.search(r'op_name="([^"]*)"', rest)
    return Collective(kind, times, received, group, far, source[1] if source else "")


def _group(rest: str, devices: int, near: int) -> tuple[int, bool]:
    """How many take part together, and whether any of them lie apart."""
    pairs = re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", rest)
    if pairs:
        ends = [tuple(map(int, pair.split(","))) for pair in re.findall(r"\{(\d+,\d+)\}", pairs[1])]
        return 2, any(source // near != target // near for source, target in ends)
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
    if listed:
        members = np.array([int(member) for member in listed[1].split(",")])
    else:
        iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
        if iota is None:
            return devices, devices > near
        numbers = lambda text: [int(number) for number in text.split(",")]  # noqa: E731
        order = np.arange(int(iota[1]) * int(iota[2])).reshape(numbers(iota[3]))
        members = (order.transpose(numbers(iota[4])) if iota[4] else order).reshape(int(iota[1]), -1)[0]
    return len(members), len(set((members // near).tolist())) > 1


def _bytes(dtype: str, shape: str) -> int:
    bits = 8 if dtype == "pred" else int(re.sub(r"^f8.*", "f8", dtype).lstrip("bsufc"))
    return math.prod(int(size) for size in shape.split(",") if size) * bits // 8
