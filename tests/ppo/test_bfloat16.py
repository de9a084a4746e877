"""PPO in bfloat16, the default on GPU and TPU: the scorer and the update round log-probs in the same way."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jax_rlhf import RLHFEngine
from tests.ppo import tiny

ROWS = 16


@pytest.mark.parametrize(("remat", "microbatch"), [("none", 4), ("dots", 16)])
def test_ratios_start_at_one_with_and_without_remat(remat, microbatch):
    """The model is random with a peaked distribution, and has 4 layers of width 256.

    If XLA may skip roundings, the log-probs of the experience, of the sampler and of all rows at once differ by up to
    0.78 nats, on a CPU that has bfloat16 operations.
    """
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_layers": 4, "vocab_size": 256}
    options = {"dtype": "bfloat16", "remat": remat, "scale": 8.0, **shape}
    actor, reward = tiny.policy(**options), tiny.policy(5, head="scalar", **options)
    engine = RLHFEngine(dataclasses.replace(actor, tokenizer=None), reward=dataclasses.replace(reward, tokenizer=None))
    trainer = tiny.trainer(engine, reward=None, microbatch_size=microbatch, max_new_tokens=48, eos_ids=())
    made = trainer.generate_experience(tiny.ragged_prompts(ROWS, width=16))
    assert np.exp(made.logprobs).max() > 0.9  # the distribution is peaked
    mask, real = np.concatenate([made.prompt_mask, made.response_mask], axis=1), np.asarray(made.response_mask)
    at_once = engine.score(made.tokens, mask, start=16)[0]
    np.testing.assert_allclose(np.asarray(at_once)[real], np.asarray(made.logprobs)[real], atol=1e-2)
    assert np.abs(made.sampler_logprobs - made.logprobs)[real].max() < 0.4
    metrics = trainer.train_rlhf(made)
    assert metrics["val/first_ratio_gap"] < 1e-2
    assert metrics["policy/clipfrac_avg"] == 0
    assert metrics["policy/approxkl_avg"] < 1e-6
    assert metrics["objective/kl"] == 0
    assert {str(leaf.dtype) for leaf in (made.logprobs, made.values, made.scores, made.advantages)} == {"float32"}
    assert jnp.isfinite(made.scores).all()
