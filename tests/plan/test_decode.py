"""What a step of decoding moves besides what it must read, in the programs compiled for one card and one TPU chip."""

import re

import pytest

from jax_rlhf.plan.all_programs import programs_of
from jax_rlhf.plan.collectives import computations_of
from jax_rlhf.plan.topology import layout_on
from tests.plan import tiny

pytestmark = pytest.mark.usefixtures("full_compile")

MEGABYTE = 2**20
ITEM = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
ARRAY = re.compile(r"\b(\w+)\[([\d,]*)\]")
INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
MOVES = {
    "copy",
    "copy-start",
    "slice",
    "dynamic-slice",
    "gather",
    "bitcast",
    "reshape",
    "transpose",
    "convert",
    "tuple",
}


def loops_over_tokens(text):
    loops = [line for line in text.splitlines() if " while(" in line and '_turns/while"' in line]
    assert len(loops) == 2
    return loops


def largest(kind):
    """Bytes of the largest array of a result's type."""
    sizes = [0]
    for name, shape in ARRAY.findall(kind):
        size = ITEM.get(name, 4)
        for side in filter(None, shape.split(",")):
            size *= int(side)
        sizes.append(size)
    return max(sizes)


def moved(text):
    """Of the loops over tokens, the instructions that only move a megabyte or more: slices and copies."""
    computations = computations_of(text)
    found, names = [], [re.search(r"body=%?([\w.\-]+)", loop)[1] for loop in loops_over_tokens(text)]
    while names:
        for line in computations[names.pop()]:
            _, name, kind, operation, rest = INSTRUCTION.match(line).groups()
            if operation == "while":
                names.append(re.search(r"body=%?([\w.\-]+)", rest)[1])
            inner = re.search(r"calls=%?([\w.\-]+)", rest) if operation == "fusion" else None
            operations = {INSTRUCTION.match(line)[4] for line in computations[inner[1]]} if inner else {operation}
            computes = operations - MOVES - {"parameter", "constant", "get-tuple-element", "compare", "add", "select"}
            fetched = operation == "copy-start" and "S(1)" in kind  # into a TPU's fast memory, ahead of the product
            if (
                largest(kind) >= MEGABYTE
                and not fetched
                and operations & (MOVES - {"bitcast", "tuple"})
                and not computes
            ):
                found.append(name)
    return found


@pytest.fixture(scope="module", params=["h100:1", "v5e:1x1"])
def rollout(request, tmp_path_factory):
    """A rollout of two stages, and its compiled text."""
    topology = tiny.topology(request.param)
    changes = {
        "phases": ("ppo",),
        "data.ppo_batch_size": 8,
        "ppo.microbatch_size": 4,
        "ppo.sampling.max_new_tokens": 256,
    }
    settings = tiny.settings(tmp_path_factory.mktemp("plan"), **changes)
    layout = layout_on(topology, settings)
    program = next(one for one in programs_of(settings, layout) if one.name.startswith("rollout"))
    return program, program.function.lower(*program.arguments).compile().as_text()


def test_no_kernel_and_no_cache_is_copied_before_it_is_read(rollout):
    """Kernels of 2 to 4 MB, keys and values of 4 MB per layer; logits of 0.25 MB may be put into another order."""
    assert moved(rollout[1]) == []


def test_the_plan_counts_what_the_loops_hold(rollout):
    """Kernels and the cache of each stage; besides, the loops hold the table of 16 MiB that tokens are looked up in."""
    program, text = rollout
    read = 0
    for line in loops_over_tokens(text):
        turns = int(re.search(r"decode_(\d+)_turns", line)[1])
        held = [largest(f"{name}[{shape}]") for name, shape in ARRAY.findall(line.partition(" while(")[0])]
        read += turns * (sum(size for size in held if size >= MEGABYTE / 2) - 8192 * 1024 * 2)
    assert program.decode == pytest.approx(read, rel=2e-3)
