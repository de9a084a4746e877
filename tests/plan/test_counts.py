"""FLOPs, collectives and latencies that a plan counts, for programs and compiler output with known counts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_rlhf.models import DecoderConfig
from jax_rlhf.models.flash import flash_attend
from jax_rlhf.parallel import MeshConfig, create_layout
from jax_rlhf.plan.bounds import latency
from jax_rlhf.plan.collectives import Collective, collectives
from jax_rlhf.plan.flops import product_flops
from jax_rlhf.plan.shapes import model_shape
from jax_rlhf.sampling.sampler import loop_scope
from tests.plan.tiny import topology


def test_flops_include_every_step_of_every_loop():
    weights = jnp.zeros((5, 16, 16))

    def layer(x, w):
        return jnp.tanh(x @ w), None

    def scanned(x):
        return jax.lax.scan(layer, x, weights)[0]

    x = jnp.zeros((3, 16))
    once = 2 * 3 * 16 * 16
    assert product_flops(jax.make_jaxpr(scanned)(x)) == 5 * once
    # The backward pass has two products per forward product, and remat repeats the forward products.
    loss = lambda x, w: jnp.sum(jax.lax.scan(layer, x, w)[0])  # noqa: E731
    assert product_flops(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(x, weights)) == 15 * once
    again = lambda x, w: jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, w)[0])  # noqa: E731
    assert product_flops(jax.make_jaxpr(jax.grad(again, argnums=(0, 1)))(x, weights)) == 20 * once

    def over_tokens(x):
        with jax.named_scope(loop_scope(7)):
            return jax.lax.while_loop(lambda c: c[0] < 9, lambda c: (c[0] + 1, scanned(c[1])), (0, x))

    assert product_flops(jax.make_jaxpr(over_tokens)(x)) == 7 * 5 * once
    branch = lambda x: jax.lax.cond(x[0, 0] > 0, scanned, lambda x: x @ weights[0], x)  # noqa: E731
    assert product_flops(jax.make_jaxpr(jax.jit(branch))(x)) == 5 * once


@pytest.mark.parametrize(("platform", "backward"), [("tpu", 7), ("gpu", 5)])
def test_attention_kernels_count_the_flops_of_their_products(monkeypatch, platform, backward):
    if platform == "gpu":
        topology("h100:8")  # otherwise JAX asks for this machine's cuDNN
    monkeypatch.setattr(DecoderConfig, "platform", platform)
    layout = create_layout(MeshConfig(data=2, fsdp=2, tensor=2), None)
    config, _ = model_shape("llama3-8b")
    config = config.replace(attention="flash", dtype="bfloat16", layout=layout)
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    arguments = shape((4, 256, 32, 128)), shape((4, 8, 256, 128)), shape((4, 8, 256, 128))

    def attention(query, key, value):
        mask = jnp.ones((4, 256), bool)
        mixed = flash_attend(query, key, value, mask, None, config=config, window=None, scale=0.1)
        return jnp.sum(mixed.astype(jnp.float32))

    product = 2 * 4 * 32 * 256 * 256 * 128
    assert product_flops(jax.make_jaxpr(attention)(*arguments)) == 2 * product
    both = product_flops(jax.make_jaxpr(jax.grad(attention, argnums=(0, 1, 2)))(*arguments))
    assert both == pytest.approx((2 + backward) * product, rel=0.01)


def compiled(function, *shapes, specs, out):
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"))
    place = functools.partial(NamedSharding, mesh)
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place(spec))
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    return jax.jit(function, out_shardings=place(out)).lower(*arguments).compile().as_text()


@pytest.mark.parametrize(
    ("before", "after", "kind", "size"),
    [
        (PartitionSpec("fsdp"), PartitionSpec(), "all-gather", 64 * 32 * 4 * 3 / 4),
        (PartitionSpec("data"), PartitionSpec(), "all-gather", 64 * 32 * 4 / 2),
        (PartitionSpec("fsdp"), PartitionSpec(None, "fsdp"), "all-to-all", 64 * 32 * 4 / 4 * 3 / 4),
    ],
)
def test_a_reshard_is_one_collective_with_the_expected_bytes(before, after, kind, size):
    (one,) = collectives(compiled(lambda x: x, (64, 32), specs=[before], out=after), devices=8)
    assert (one.kind, one.count, one.bytes) == (kind, 1, size)


def test_collectives_in_a_scan_count_once_per_step_of_the_scan():
    def layers(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w) @ w.T, None), x, weights)[0]

    text = compiled(
        layers,
        (16, 64),
        (6, 64, 32),
        specs=[PartitionSpec(), PartitionSpec(None, None, "fsdp")],
        out=PartitionSpec(),
    )
    (one,) = collectives(text, devices=8, devices_per_machine=4)
    assert (one.kind, one.count, one.group, one.local_group) == ("all-reduce", 6, 4, 4)
    assert one.bytes == 2 * 16 * 64 * 4 * 3 / 4


def test_latency_counts_the_steps_of_a_collective():
    def seconds(name, kind, group, near):
        return latency(Collective(kind, 1, 0.0, group, near, ""), topology(name))

    start, hop, network = 3.6e-6, 0.47e-6, 2.7e-6
    assert seconds("h100:8", "all-reduce", 8, 8) == pytest.approx(start + 14 * hop)
    assert seconds("h100:8", "all-gather", 8, 8) == pytest.approx(start + 7 * hop)
    assert seconds("h100:4x8", "all-reduce", 32, 8) == pytest.approx(start + 2 * (28 * hop + 3 * network))
    assert seconds("h100:4x8", "all-gather", 4, 1) == pytest.approx(start + 3 * network)
    assert seconds("h100:4x8", "collective-permute", 2, 1) == pytest.approx(start + network)
    assert seconds("v5e:4x4", "all-reduce", 16, 16) == pytest.approx(8e-6)
    assert seconds("v5e:4x4", "collective-permute", 2, 2) == pytest.approx(1e-6)


def test_collectives_that_cross_machines_are_distinguished():
    text = compiled(lambda x: x, (64, 32), specs=[PartitionSpec("data")], out=PartitionSpec())
    assert [(one.group, one.local_group) for one in collectives(text, devices=8, devices_per_machine=4)] == [(2, 1)]
    assert [(one.group, one.local_group) for one in collectives(text, devices=8, devices_per_machine=8)] == [(2, 2)]


TPU = """HloModule jit_f, entry_computation_layout={()->()}

%all-reduce-scatter.1 (input: bf16[64,32]) -> bf16[8,32] {
  %input = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.2 = bf16[64,32]{1,0:T(8,128)(2,1)} all-reduce(%input), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %dynamic-slice = bf16[8,32]{1,0} dynamic-slice(%all-reduce.2), dynamic_slice_sizes={8,32}
}

%condition (arg: (s32[], bf16[64,32])) -> pred[] {
  %arg = (s32[], bf16[64,32]{1,0}) parameter(0)
  %turn = s32[] get-tuple-element(%arg), index=0
  %constant.3 = s32[]{:T(128)} constant(11)
  ROOT %less = pred[] compare(%turn, %constant.3), direction=LT
}

%body (arg.1: (s32[], bf16[64,32])) -> (s32[], bf16[64,32]) {
  %arg.1 = (s32[], bf16[64,32]{1,0}) parameter(0)
  %value = bf16[64,32]{1,0} get-tuple-element(%arg.1), index=1
  %fusion = bf16[8,32]{1,0} fusion(%value), kind=kCustom, calls=%all-reduce-scatter.1
  %start = (bf16[64,32]{1,0}, bf16[64,32]{1,0}) collective-permute-start(%value), source_target_pairs={{0,1},{3,0}}
  %done = bf16[64,32]{1,0} collective-permute-done(%start)
  ROOT %tuple = (s32[], bf16[64,32]{1,0}) tuple(%turn.2, %done)
}

ENTRY %main () -> bf16[64,32] {
  %while = (s32[], bf16[64,32]{1,0}) while(%init), condition=%condition, body=%body, metadata={op_name="jit(f)/while"}
  %mean = f32[4]{0} all-reduce(%x), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, to_apply=%add
}
"""


def test_the_text_of_the_tpu_compiler_is_parsed():
    scatter, permute, mean = collectives(TPU, devices=8, devices_per_machine=4)
    assert (scatter.kind, scatter.count, scatter.bytes, scatter.group) == ("reduce-scatter", 11, 64 * 32 * 2 * 7 / 8, 8)
    assert (permute.kind, permute.count, permute.bytes, permute.local_group) == (
        "collective-permute",
        11,
        64 * 32 * 2,
        2,
    )
    assert (mean.kind, mean.count, mean.bytes, mean.group, mean.local_group) == ("all-reduce", 1, 16, 2, 1)
