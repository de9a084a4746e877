"""Both device programs lower for TPU and for CUDA, in the forms that those run, without such a chip."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax import export

from jax_rlhf import RLHFEngine
from jax_rlhf.ppo import programs
from tests.ppo import tiny


@pytest.mark.parametrize(("platform", "backend"), [("tpu", "tpu"), ("cuda", "gpu")])
def test_generation_and_update_lower(platform, backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)  # scanned decoding, larger chunks
    how = {"dtype": jnp.bfloat16, "remat": "full"}
    engine = RLHFEngine(tiny.policy(**how), reward=tiny.policy(3, head="scalar", **how))
    ppo = tiny.trainer(engine, reward=None, top_p=0.9, num_minibatches=2, ppo_epochs=2, target_kl=0.1)
    config = dataclasses.replace(ppo.config, microbatch_size=4)
    batch, key = tiny.ragged_prompts(16), jax.random.key(0)

    def generate(trained, tokens, mask, row_ids):
        arguments = (engine.params.frozen, tokens, mask, row_ids, key, config, ppo.state.kl.value)
        return programs.generate(engine.models, ppo.sampling, trained, *arguments)

    def update(trained, state, experience):
        return programs.update(engine.models, config, None, trained, state, engine.params.frozen, experience, None, key)

    arguments = (engine.params.trainable, batch.tokens, batch.mask, batch.row_ids)
    experience = jax.eval_shape(generate, *arguments)
    lowered = export.export(jax.jit(generate), platforms=[platform])(*arguments)
    assert lowered.platforms == (platform,)
    assert "tensor<2x16x4x10x8xbf16>" in lowered.mlir_module()  # all layers' keys in one array: the scanned form
    lowered = export.export(jax.jit(update), platforms=[platform])(engine.params.trainable, ppo.state, experience)
    assert lowered.platforms == (platform,)
    assert "bf16" in lowered.mlir_module()
