"""The programs that training runs, compiled for a TPU slice and for GPUs that are not here.

What this shows: they compile, are partitioned as the table says, update cache and state in place. Not that they compute
the right numbers (tests/parallel/test_meshes.py), nor how fast.
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
from jax_rlhf.plan.collectives import collectives, computations_of
from jax_rlhf.plan.topology import layout_on
from tests.plan import tiny

pytestmark = pytest.mark.usefixtures("full_compile")

CHIPS = ["v5e:2x4", pytest.param("h100:8", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=CHIPS)
def compiled(request, tmp_path_factory):
    """PPO's programs by name, compiled for 8 devices with fsdp=8, and what the compiler complained of."""
    topology = tiny.topology(request.param)
    settings = tiny.settings(tmp_path_factory.mktemp("plan"), phases=("ppo",))
    layout = layout_on(topology, settings)
    capture = request.getfixturevalue("stderr_of_module")
    programs = {program.name: program for program in programs_of(settings, layout) if program.name != "scoring"}
    done = {name: program.function.lower(*program.arguments).compile() for name, program in programs.items()}
    return request.param, programs, done, capture()


@pytest.fixture(scope="module")
def stderr_of_module(tmp_path_factory):
    """What the process has written to standard error, XLA's C++ included, since the module began."""
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


def test_no_weight_is_put_together_whole_on_a_device(compiled):
    _, _, _, complaints = compiled
    assert "nvoluntary full rematerialization" not in complaints


def test_state_lies_in_eighths_and_is_updated_in_place(compiled):
    _, programs, done, _ = compiled
    program = programs["update"]
    state = program.resident["parameters"][0], program.resident["optimizer"]
    whole = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert device_bytes(state) < 1.02 * whole / 8  # norms are whole
    assert done["update"].memory_analysis().alias_size_in_bytes > 0.99 * device_bytes(state)


def test_the_cache_is_never_copied_while_tokens_are_drawn(compiled):
    _, programs, done, _ = compiled
    config = config_from_hub(tiny.SHAPE)
    shape = (config.num_layers, 32, config.num_kv_heads, 128 + 128 - 1, config.head_dim)
    axes = ("layers", "rows", "kv_heads", "length", "head_dim")
    local = programs["rollout"].rollout.sharding(axes, shape).shard_shape(shape)
    assert math.prod(local) * 8 == math.prod(shape)
    pattern = re.compile(rf"bf16\[{','.join(map(str, local))}\]\S* (copy|copy-start)\(")
    text = done["rollout"].as_text()
    assert f"bf16[{','.join(map(str, local))}]" in text
    # Between prefill and decoding, once, a TPU puts it into the order that decoding wants.
    copies = [line for line in lines_in_loops(text) if pattern.search(line)]
    assert copies == []


def test_decoding_sends_two_sums_a_layer_and_no_weights(compiled):
    _, _, done, _ = compiled
    turns = 127
    sent = [one for one in collectives(done["rollout"].as_text(), devices=8) if one.count >= turns]
    sums = [one for one in sent if one.kind == "all-reduce" and "/layers/" in one.source]
    assert sorted(one.count for one in sums) == [2 * turns] * 2  # attention's and the MLP's output, of 2 layers
    a_row = 32 * 1024 * 2  # a batch of one token in bfloat16, the residual stream
    assert all(one.bytes <= 2 * a_row for one in sums)
    drawn = 32 * 8192 * 4 / 8  # the logits, for whole rows
    assert all(one.bytes <= 2 * max(a_row, drawn) for one in sent)


def test_the_update_gathers_weights_and_scatters_gradients(compiled):
    _, _, done, _ = compiled
    moved = collections.Counter()
    for one in collectives(done["update"].as_text(), devices=8):
        moved[one.kind] += one.count * one.bytes
    layers = 2 * (4 * 1024 * 1024 + 3 * 1024 * 2048) * 2 * 7 / 8  # bytes of both layers' kernels that others hold
    steps = 2 * 2 * 2 * 2  # models × epochs × minibatches × microbatches
    # To the forward pass, to the backward pass (again for what remat computes again), tables and head.
    assert 2 * steps * layers < moved["all-gather"] + moved["collective-permute"] < 10 * steps * layers
    # Gradients go back by reduce-scatter; for small weights a TPU chooses an all-reduce, which sends twice as much.
    assert moved["reduce-scatter"] + moved["all-reduce"] / 2 > 0.8 * steps * layers
    assert moved["reduce-scatter"] > moved["all-reduce"]
