"""Both device programs lower for TPU and CUDA, on a machine without such a device."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax import export

from jax_rlhf import RLHFEngine
from jax_rlhf.ppo.step import make_experience, make_update
from jax_rlhf.rl import Prompts
from tests.ppo import tiny


@pytest.mark.parametrize(("platform", "backend"), [("tpu", "tpu"), ("cuda", "gpu")])
def test_generation_and_update_lower_for_tpu_and_cuda(platform, backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)  # scanned decoding, larger chunks
    options = {"dtype": jnp.bfloat16, "remat": "full"}
    engine = RLHFEngine(tiny.policy(**options), reward=tiny.policy(3, head="scalar", **options))
    ppo = tiny.trainer(engine, reward=None, top_p=0.9, num_minibatches=2, ppo_epochs=2, target_kl=0.1)
    config = dataclasses.replace(ppo.config, microbatch_size=4)
    batch, key = tiny.ragged_prompts(16), jax.random.key(0)

    def generate(params, tokens, mask, row_ids):
        prompts = Prompts(tokens, mask, row_ids, columns=None)
        return make_experience(engine.models, config)(params, prompts, key, ppo.state.kl.value)

    def update(trainable, state, experience):
        return make_update(engine.models, config)(trainable, state, engine.params.frozen, experience, None, key)

    arguments = (engine.params, batch.tokens, batch.mask, batch.row_ids)
    experience = jax.eval_shape(generate, *arguments)
    lowered = export.export(jax.jit(generate), platforms=[platform])(*arguments)
    assert lowered.platforms == (platform,)
    assert "tensor<2x16x4x10x8xbf16>" in lowered.mlir_module()  # all layers' keys in one array: the scanned form
    lowered = export.export(jax.jit(update), platforms=[platform])(engine.params.trainable, ppo.state, experience)
    assert lowered.platforms == (platform,)
    assert "bf16" in lowered.mlir_module()
