"""A tiny random checkpoint with a tokenizer, 100 preference pairs, and the config of a run that trains on them."""

import jax
import numpy as np

from jax_rlhf import Pretrained, save_pretrained
from jax_rlhf.config import default_config
from jax_rlhf.hub import config_from_hub
from jax_rlhf.models import Decoder, init_params
from tests.data import tiny as data


def checkpoint(folder, *, seed=0, layers=3, vocabulary=None, head="lm", tied=True, tokenizer=None, **biases):
    """Saves a tiny random Llama of width 32: a policy, or with head="scalar" a reward model. Returns its folder."""
    tokenizer = tokenizer or data.tokenizer()
    config = config_from_hub(
        {
            "model_type": "llama",
            "vocab_size": vocabulary or len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "tie_word_embeddings": tied,
            "bos_token_id": data.BOS,
            "eos_token_id": data.EOS,
            "pad_token_id": data.PAD,
        }
    )
    model = Decoder(config.replace(remat="none"), head=head)
    params = init_params(model, jax.random.key(seed))
    save_pretrained(folder, Pretrained(model, params, tokenizer, **biases))
    return str(folder)


def preferences(file, count=100):
    """Writes pairs with prompts of three letters. The chosen response repeats "a", the rejected one repeats "b"."""
    random = np.random.RandomState(0)
    rows = []
    for text in data.letters(count):
        lengths = random.randint(2, 6, 2)
        rows.append(
            {"prompt": text, "chosen": " ".join("a" * lengths[0]), "rejected": " ".join("b" * lengths[1]), "tag": "t"}
        )
    return data.write(file, rows)


def config(folder, **changes):
    """The config of a run of all phases, each of which takes a few seconds."""
    config = default_config()
    # Another process may have made the files. Making them uses JAX, which a config file must not do: several processes
    # read it before they connect to each other.
    made = (folder / "preferences.jsonl").is_file()
    config.model.path = str(folder / "base") if made else checkpoint(folder / "base")
    config.data.paths = (str(folder / "preferences.jsonl") if made else preferences(folder / "preferences.jsonl"),)
    config.data.max_tokens, config.data.max_prompt_tokens, config.data.length_buckets = 16, 4, (16,)
    config.data.sft_batch_size = config.data.reward_batch_size = config.data.ppo_batch_size = 8
    config.data.eval_rows = 10
    config.sft.steps, config.sft.optimizer.learning_rate = 12, 1e-2
    config.sft.sample_tokens = 3
    config.reward.steps, config.reward.optimizer.learning_rate = 12, 3e-3
    config.reward.num_layers = 2
    config.reward.normalize_rows = 16
    config.ppo.eval_functions = ("tests.cli.tiny:count_a",)
    config.ppo.iterations, config.ppo.sampling.max_new_tokens = 3, 6
    config.ppo.ppo_epochs = config.ppo.num_minibatches = 2
    config.ppo.actor.optimizer.learning_rate = config.ppo.critic.optimizer.learning_rate = 1e-3
    with config.unlocked():
        config.update(changes)
    return config


def count_a(prompts, responses, **columns):
    del prompts, columns
    return [response.split().count("a") - 1.0 for response in responses]
