"""What a step of decoding moves besides what it must read, in the programs compiled for one card and one TPU chip."""

import re

import pytest

from jax_rlhf.parallel import create_layout
from jax_rlhf.plan.abstract import programs_of
from jax_rlhf.plan.collectives import computations_of
from tests.plan import tiny

pytestmark = pytest.mark.usefixtures("full_compile")

MEGABYTE = 2**20
ITEM = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
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


def largest(kind):
    """Bytes of the largest array of a result's type."""
    sizes = [0]
    for name, shape in re.findall(r"\b(\w+)\[([\d,]*)\]", kind):
        size = ITEM.get(name, 4)
        for side in filter(None, shape.split(",")):
            size *= int(side)
        sizes.append(size)
    return max(sizes)


def moved(text):
    """Of the loop over tokens, the instructions that only move a megabyte or more: slices and copies."""
    computations = computations_of(text)
    (loop,) = (line for line in text.splitlines() if " while(" in line and 'decode/while"' in line)
    found, names = [], [re.search(r"body=%?([\w.\-]+)", loop)[1]]
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


@pytest.mark.parametrize("name", ["h100:1", "v5e:1x1"])
def test_no_kernel_and_no_cache_is_copied_before_it_is_read(name, tmp_path):
    """Kernels of 2 to 4 MB, keys and values of 4 MB per layer; logits of 0.25 MB may be put into another order."""
    topology = tiny.topology(name)
    settings = tiny.settings(tmp_path, **{"phases": ("ppo",), "data.ppo_batch_size": 8, "ppo.microbatch_size": 4})
    layout = create_layout(settings.mesh, settings.rollout_mesh, topology.devices)
    program = next(one for one in programs_of(settings, layout) if one.name.startswith("rollout"))
    text = program.function.lower(*program.arguments).compile().as_text()
    assert moved(text) == []
