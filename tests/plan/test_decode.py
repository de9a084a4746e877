"""A decoding step copies no large arrays, in programs compiled for one GPU and for one TPU chip."""

import re

import pytest

from jax_rlhf.plan.all_programs import programs_of
from jax_rlhf.plan.topology import layout_on
from tests.plan import tiny
from tests.programs import computations_of

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
    """Bytes of the largest array in an instruction's result type."""
    sizes = [0]
    for name, shape in ARRAY.findall(kind):
        size = ITEM.get(name, 4)
        for side in filter(None, shape.split(",")):
            size *= int(side)
        sizes.append(size)
    return max(sizes)


def moved(text):
    """The instructions in the loops over tokens that only slice or copy, and whose result has a megabyte or more."""
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
            fetched = operation == "copy-start" and "S(1)" in kind  # prefetched into a TPU's fast memory
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
    """A rollout program with two decoding loops, and its compiled text."""
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


def test_kernels_and_caches_are_not_copied_before_they_are_read(rollout):
    """Kernels have 2 to 4 MB, keys and values 4 MB per layer. Logits of 0.25 MB may be copied."""
    assert moved(rollout[1]) == []


def test_the_plan_counts_the_bytes_that_decoding_reads(rollout):
    """Decoding reads the kernels and the cache, but only looks up single rows of the embedding table of 16 MiB."""
    program, text = rollout
    read = 0
    for line in loops_over_tokens(text):
        turns = int(re.search(r"decode_(\d+)_turns", line)[1])
        held = [largest(f"{name}[{shape}]") for name, shape in ARRAY.findall(line.partition(" while(")[0])]
        read += turns * (sum(size for size in held if size >= MEGABYTE / 2) - 8192 * 1024 * 2)
    assert program.decode == pytest.approx(read, rel=2e-3)
