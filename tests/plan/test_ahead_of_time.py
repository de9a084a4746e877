"""PPO's programs, compiled for a TPU slice and for GPUs that are not present.

The tests show that the programs compile, are sharded as the table says, and update cache and state in place. They do
not show that the results are right (tests/parallel/test_meshes.py does), or how fast the programs are.
"""

import collections
import math
import os
import re

import jax
import pytest

from jax_rlhf.hub import config_from_hub
from jax_rlhf.plan.abstract import device_bytes
from jax_rlhf.plan.all_programs import programs_of
from jax_rlhf.plan.collectives import collectives
from jax_rlhf.plan.topology import layout_on
from tests.plan import tiny
from tests.programs import computations_of

pytestmark = pytest.mark.usefixtures("full_compile")

CHIPS = ["v5e:2x4", pytest.param("h100:8", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=CHIPS)
def compiled(request, tmp_path_factory):
    """PPO's programs by name, compiled for 8 devices with fsdp=8, and the compiler's messages."""
    topology = tiny.topology(request.param)
    settings = tiny.settings(tmp_path_factory.mktemp("plan"), phases=("ppo",))
    layout = layout_on(topology, settings)
    capture = request.getfixturevalue("stderr_of_module")
    programs = {program.name: program for program in programs_of(settings, layout) if program.name != "scoring"}
    done = {name: program.function.lower(*program.arguments).compile() for name, program in programs.items()}
    return request.param, programs, done, capture()


@pytest.fixture(scope="module")
def stderr_of_module(tmp_path_factory):
    """A function that returns what the process, including XLA's C++, has written to standard error in this module."""
    file = tmp_path_factory.mktemp("stderr") / "lines"
    kept = os.dup(2)
    with file.open("wb") as handle:
        os.dup2(handle.fileno(), 2)
    yield lambda: file.read_text(errors="replace")
    os.dup2(kept, 2)
    os.close(kept)


def lines_in_loops(text):
    """The lines of all computations that run inside a loop."""
    found, seen = computations_of(text), set()
    names = re.findall(r"body=%?([\w.\-]+)", text)
    while names:
        name = names.pop()
        if name in found and name not in seen:
            seen.add(name)
            for line in found[name]:
                names += re.findall(r"(?:calls|to_apply|body)=%?([\w.\-]+)", line)
    return [line for name in seen for line in found[name]]


def test_the_compiler_reports_no_full_rematerialization(compiled):
    _, _, _, complaints = compiled
    assert "nvoluntary full rematerialization" not in complaints


def test_the_state_is_sharded_in_eighths_and_updated_in_place(compiled):
    _, programs, done, _ = compiled
    program = programs["update"]
    state = program.resident["parameters"][0], program.resident["optimizer"]
    whole = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert device_bytes(state) < 1.02 * whole / 8  # norms are replicated
    assert done["update"].memory_analysis().alias_size_in_bytes > 0.99 * device_bytes(state)


def test_the_kv_cache_is_not_copied_while_tokens_are_sampled(compiled):
    _, programs, done, _ = compiled
    config = config_from_hub(tiny.SHAPE)
    shape = (config.num_layers, 32, config.num_kv_heads, 128 + 128 - 1, config.head_dim)
    axes = ("layers", "rows", "kv_heads", "length", "head_dim")
    local = programs["rollout"].rollout.sharding(axes, shape).shard_shape(shape)
    assert math.prod(local) * 8 == math.prod(shape)
    pattern = re.compile(rf"bf16\[{','.join(map(str, local))}\]\S* (copy|copy-start)\(")
    text = done["rollout"].as_text()
    assert f"bf16[{','.join(map(str, local))}]" in text
    # A TPU may copy it once between prefill and decoding, to the memory layout of decoding.
    copies = [line for line in lines_in_loops(text) if pattern.search(line)]
    assert copies == []


def test_decoding_sends_two_sums_per_layer_and_no_weights(compiled):
    _, _, done, _ = compiled
    turns = 127
    sent = [one for one in collectives(done["rollout"].as_text(), devices=8) if one.count >= turns]
    sums = [one for one in sent if one.kind == "all-reduce" and "/layers/" in one.source]
    assert sorted(one.count for one in sums) == [2 * turns] * 2  # the outputs of attention and of the MLP, in 2 layers
    a_row = 32 * 1024 * 2  # the residual stream of one token per row, in bfloat16
    assert all(one.bytes <= 2 * a_row for one in sums)
    drawn = 32 * 8192 * 4 / 8  # the logits, resharded to whole rows
    assert all(one.bytes <= 2 * max(a_row, drawn) for one in sent)


def test_the_update_gathers_weights_and_scatters_gradients(compiled):
    _, _, done, _ = compiled
    moved = collections.Counter()
    for one in collectives(done["update"].as_text(), devices=8):
        moved[one.kind] += one.count * one.bytes
    layers = 2 * (4 * 1024 * 1024 + 3 * 1024 * 2048) * 2 * 7 / 8  # bytes of both layers' kernels on the other devices
    steps = 2 * 2 * 2 * 2  # models × epochs × minibatches × microbatches
    # For the forward pass, for the backward pass with its recomputation (remat), and for tables and head.
    assert 2 * steps * layers < moved["all-gather"] + moved["collective-permute"] < 10 * steps * layers
    # Gradients use reduce-scatter. For small weights a TPU chooses all-reduce, which sends twice as much.
    assert moved["reduce-scatter"] + moved["all-reduce"] / 2 > 0.8 * steps * layers
    assert moved["reduce-scatter"] > moved["all-reduce"]
