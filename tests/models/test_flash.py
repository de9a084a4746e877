"""Flash attention compared with plain attention: values, gradients, whole models, and compiled programs.

The splash kernel runs in Pallas's interpreter. cuDNN's kernel needs a GPU, so JAX's plain function takes its place,
with the same arguments. This tests the lengths, masks, windows and permutations that cuDNN gets. A program that is
compiled for an H100 shows that it calls cuDNN.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

from jax_rlhf import RLHFEngine
from jax_rlhf.hub.config import ModelConfig
from jax_rlhf.hub.load_model import running
from jax_rlhf.models import Decoder, DecoderConfig, Rotary, attention, create_cache, init_params
from jax_rlhf.models.attention import AttentionContext, attend, token_order, visible
from jax_rlhf.models.flash import MIN_LENGTH, check_flash, flash_attend, uses_flash
from jax_rlhf.parallel import MeshConfig, RolloutMeshConfig, create_layout
from jax_rlhf.ppo.trainer import in_one_program
from jax_rlhf.sampling.weights import reshard
from tests.models.test_decoder import tiny_config
from tests.plan.tiny import topology
from tests.ppo import tiny


def small(**fields):
    """A config with alternating sliding windows, as in Gemma, and grouped-query attention."""
    fields = {"sliding_window": 20, "sliding_layers": (True, False), "num_layers": 2, "max_positions": 512} | fields
    return tiny_config(head_dim=8, rotary=Rotary(theta=1e4, dim=8), attention_scale=8**-0.5, **fields)


@jax.custom_vjp
def unclear_gradient(x, pads):
    return x


unclear_gradient.defvjp(lambda x, pads: (x, pads), lambda pads, g: (jnp.where(pads[..., None, None], jnp.nan, g), None))


@pytest.fixture(params=["tpu", "gpu"])
def platform(request, monkeypatch):
    """Models select this platform's kernel, which is interpreted (TPU) or replaced by a plain function (GPU)."""
    monkeypatch.setattr(DecoderConfig, "platform", request.param)
    make = functools.partial(splash_attention_kernel.make_splash_mha_single_device, interpret=True)
    monkeypatch.setattr(splash_attention_kernel, "make_splash_mha_single_device", make)
    plain = jax.nn.dot_product_attention

    def stand_in(*arrays, implementation, mask, query_seq_lengths, **options):
        assert implementation == "cudnn"
        assert mask is None or mask.shape[-1] % 2 == 0  # cuDNN requires this
        pads = jnp.arange(arrays[0].shape[1]) >= query_seq_lengths[:, None]
        arrays = (unclear_gradient(array, pads) for array in arrays)
        result = plain(*arrays, mask=mask, query_seq_lengths=query_seq_lengths, **options)
        return jnp.where(pads[..., None, None], jnp.nan, result)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    monkeypatch.setattr("jax_rlhf.models.flash.check_flash", lambda config: None)  # the comparison needs float32
    return request.param


def masks(rows, length):
    """(mask, segments): pads on the left, on the right (with 4 rows: pads only) and anywhere; three texts per row."""
    place = np.arange(length)
    mask = np.stack(
        [place >= 30, (place < length - 50) & (rows < 4), np.random.RandomState(0).rand(length) < 0.6] * rows
    )[:rows]
    return jnp.asarray(mask), jnp.broadcast_to(jnp.asarray(place // (length // 3 + 1), jnp.int32), mask.shape)


@pytest.mark.parametrize(("window", "packed", "cap"), [(None, False, None), (None, True, 2.0), (17, True, None)])
def test_values_and_gradients_equal_plain_attention(platform, window, packed, cap):
    length, cap = 151, None if platform == "gpu" else cap  # cuDNN has no soft cap
    draw = np.random.RandomState(1)
    query, weight = (jnp.asarray(draw.standard_normal((3, length, 4, 8)), jnp.float32) for _ in range(2))
    key, value = (jnp.asarray(draw.standard_normal((3, 2, length, 8)), jnp.float32) for _ in range(2))
    mask, segments = masks(3, length)
    segments = segments if packed else None
    config = small(attention="flash", attention_softcap=cap)

    def plain(query, key, value):
        context = AttentionContext(*token_order(mask), None, None, None, segments)
        return attend(query, key, value, visible(context, window), scale=0.4, cap=cap)

    def flash(query, key, value):
        return flash_attend(query, key, value, mask, segments, config=config, window=window, scale=0.4)

    def outputs(function):
        real = lambda *x: jnp.where(mask[..., None, None], function(*x), 0)  # noqa: E731
        result, back = jax.vjp(real, query, key, value)
        return result, *back(weight)

    for ours, right in zip(jax.jit(lambda: outputs(flash))(), outputs(plain), strict=True):
        np.testing.assert_allclose(ours, right, atol=1e-5)


def test_a_model_on_a_mesh_is_the_same_with_flash_and_plain_attention(platform):
    layout = create_layout(MeshConfig(data=1, fsdp=4, tensor=2), None)
    mask, _ = masks(4, MIN_LENGTH)
    tokens = jax.random.randint(jax.random.key(1), mask.shape, 0, 31)
    params = init_params(Decoder(small()), jax.random.key(0))
    results = []
    for form in ("xla", "flash"):
        model = Decoder(small(attention=form, layout=layout))

        def loss(params, model=model):
            logits = model.apply({"params": params}, tokens, mask=mask)
            return jnp.sum(jnp.where(mask[..., None], logits, 0) ** 2) / 1000, logits

        lowered = jax.jit(jax.grad(loss, has_aux=True)).lower(params)
        assert ("manual_computation" in lowered.as_text()) == (form == "flash")
        results.append(lowered.compile()(params))
    (xla, xla_logits), (flash, flash_logits) = results
    np.testing.assert_allclose(*(np.where(mask[..., None], x, 0) for x in (flash_logits, xla_logits)), atol=1e-4)
    jax.tree.map(lambda ours, right: np.testing.assert_allclose(ours, right, atol=2e-4), flash, xla)


def test_prefill_uses_flash_attention_and_decoding_does_not(platform, monkeypatch):
    asked = []
    monkeypatch.setattr(
        attention, "flash_attend", lambda *x, **options: asked.append(options["window"]) or flash_attend(*x, **options)
    )
    mask, _ = masks(2, MIN_LENGTH)
    tokens = jax.random.randint(jax.random.key(1), mask.shape, 0, 31)
    windows = {"sliding_layers": (True, True)}  # the same in each layer, so known during tracing
    params = {"params": init_params(Decoder(small(**windows)), jax.random.key(0))}
    hidden, calls = {}, {}
    for form in ("xla", "flash"):
        model = Decoder(small(attention=form, **windows))
        extend = functools.partial(model.apply, params, method="extend")
        cache = create_cache(model.config, 2, MIN_LENGTH + 4, scan_layers=True)
        prompt, cache = extend(tokens, cache, mask=mask, span=MIN_LENGTH)
        calls[form], asked[:] = list(asked), []
        token, cache = extend(tokens[:, :1], cache)
        assert asked == []
        hidden[form] = jnp.where(mask[..., None], prompt, 0), token
    jax.tree.map(lambda ours, right: np.testing.assert_allclose(ours, right, atol=1e-4), hidden["flash"], hidden["xla"])
    assert calls["xla"] == []
    assert set(calls["flash"]) == {20}


def test_flash_attention_is_used_for_long_rows_on_accelerators(monkeypatch):
    flash = small(attention="flash", dtype="bfloat16")
    assert not uses_flash(flash, 512)  # on CPU
    monkeypatch.setattr(DecoderConfig, "platform", "gpu")
    assert uses_flash(flash, MIN_LENGTH)
    assert not uses_flash(flash, MIN_LENGTH - 1)
    assert not uses_flash(small(), 512)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"attention_softcap": 50.0}, r"has no soft cap, but attention_softcap is 50\.0"),
        ({"head_dim": 300}, r"needs head_dim to be a multiple of 8 up to 256, but it is 300"),
        ({"dtype": "float32"}, "needs a 16-bit dtype, but dtype is float32"),
    ],
)
def test_settings_that_cudnn_does_not_support_are_errors(monkeypatch, fields, problem):
    config = small().replace(**({"dtype": "bfloat16"} | fields))
    monkeypatch.setattr(DecoderConfig, "platform", "gpu")
    with pytest.raises(ValueError, match=rf'attention="flash": cuDNN .*{problem}\. Set attention="xla"'):
        running(config, ModelConfig(attention="flash", dtype=config.dtype.name))
    running(config, ModelConfig(attention="xla", dtype=config.dtype.name))
    monkeypatch.setattr(DecoderConfig, "platform", "tpu")
    running(config, ModelConfig(attention="flash", dtype=config.dtype.name))  # the splash kernel supports it
    rules = create_layout(MeshConfig(data=1, fsdp=4, tensor=2, rules=("kv_heads=",)), None)
    with pytest.raises(ValueError, match="splash kernel needs the same sharding of heads and kv_heads"):
        check_flash(config.replace(attention="flash", layout=rules))


def test_programs_over_two_meshes_do_not_use_cudnn(monkeypatch):
    layout = create_layout(MeshConfig(data=1, fsdp=8), RolloutMeshConfig(data=4, tensor=2))
    model = Decoder(small(attention="flash", layout=layout))
    for platform, form in (("tpu", "flash"), ("gpu", "xla")):
        monkeypatch.setattr(DecoderConfig, "platform", platform)
        assert reshard(model, {}, {})[0].config.attention == form


@pytest.mark.parametrize(
    ("chips", "kernel", "head_dim"),
    # Not every chip supports these values of head_dim.
    [("v5e:2x4", "tpu_custom_call", 64), ("h100:8", "__cudnn$fmhaSoftmax", 256)],
)
def test_compiled_programs_do_not_store_attention_scores(chips, kernel, head_dim):
    layout, length = create_layout(MeshConfig(data=1, fsdp=4, tensor=2), None, topology(chips).devices), 1024

    def shape(dtype, axes, *sizes):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=layout.sharding(axes, sizes))

    query = shape(jnp.bfloat16, ("rows", "length", "heads", "head_dim"), 8, length, 4, head_dim)
    key = shape(jnp.bfloat16, ("rows", "kv_heads", "length", "head_dim"), 8, 2, length, head_dim)
    mask = shape(jnp.bool_, ("rows", "length"), 8, length)
    config = small(attention="flash", dtype="bfloat16", layout=layout)

    def flash(query, key, value, mask):
        mixed = flash_attend(query, key, value, mask, None, config=config, window=None, scale=0.1)
        return jnp.sum(mixed.astype(jnp.float32) ** 2)

    def plain(query, key, value, mask):
        allowed = visible(AttentionContext(*token_order(mask), None, None), None)
        return jnp.sum(attend(query, key, value, allowed, scale=0.1).astype(jnp.float32) ** 2)

    for function in (flash, plain):
        text = jax.jit(jax.grad(function, (0, 1, 2))).lower(query, key, key, mask).compile().as_text()
        assert (kernel in text) == (function is flash)
        assert bool(re.search(rf"\[[\d,]*\b{length},{length}\]", text)) == (function is plain)


def test_sampling_and_scoring_are_separate_programs_with_cudnn(monkeypatch):
    engine, config = RLHFEngine(tiny.policy()), tiny.trainer().config
    assert in_one_program(engine.models, config)
    critic = engine.models.critic
    flash = dataclasses.replace(critic, model=critic.model.clone(config=critic.model.config.replace(attention="flash")))
    networks = dataclasses.replace(engine.models, critic=flash)
    assert in_one_program(networks, config)
    monkeypatch.setattr(DecoderConfig, "platform", "gpu")
    assert not in_one_program(networks, config)
    assert in_one_program(engine.models, config)
