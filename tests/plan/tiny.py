"""A run with a model of two layers, which is wide enough that compilers treat it like a large one."""

import functools
import json
import os

import pytest

from jax_rlhf.config import default_config, run_config
from jax_rlhf.plan.topology import describe_topology

SHAPE = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def config(folder, **flat):
    """The config of a run of all phases with a model of that shape."""
    file = folder / "config.json"
    file.write_text(json.dumps(SHAPE))
    config = default_config()
    config.model.path = str(file)
    config.data.max_prompt_tokens, config.data.max_tokens = 128, 256
    config.data.sft_batch_size = config.data.reward_batch_size = config.data.ppo_batch_size = 32
    config.ppo.sampling.max_new_tokens, config.ppo.num_minibatches, config.ppo.ppo_epochs = 128, 2, 2
    config.ppo.microbatch_size = 8
    with config.unlocked():
        config.update_from_flattened_dict(flat)
    return config


def settings(folder, **flat):
    return run_config(config(folder, **flat))


@functools.cache
def topology(name):
    """A described topology; skips the test if its compiler is not installed."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        return describe_topology(name)
    except RuntimeError as error:
        pytest.skip(f"the compiler for {name} is not here (requirements-dev.txt has it): {error}")
