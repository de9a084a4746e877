"""A PPO task with an exact solution: 8 tokens, responses of 4 tokens, and a reward for each of the 4,096 responses.

With the KL penalty β, the optimal policy is π* ∝ π_ref exp(r / β). Its E[r] − β KL is β log E_ref[exp(r / β)].
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jax_rlhf import PPOTrainer, Pretrained, Prompts, RLHFEngine
from jax_rlhf.hub.families import config_from_hub
from jax_rlhf.models import Decoder, init_params
from jax_rlhf.ppo.config import PPOConfig
from jax_rlhf.settings import from_mapping, new_name

VOCAB, LENGTH = 8, 4
WORDS = [f"w{index}" for index in range(VOCAB)]
RESPONSES = np.stack(np.unravel_index(np.arange(VOCAB**LENGTH), (VOCAB,) * LENGTH), axis=1)  # [4096, 4]


def _table():
    """The reward of each response: a term per token and position, a term per pair of neighbours, and some noise."""
    random = np.random.RandomState(1)
    places, pairs = random.randn(LENGTH, VOCAB), random.randn(LENGTH - 1, VOCAB, VOCAB)
    table = 0.6 * sum(places[i, RESPONSES[:, i]] for i in range(LENGTH))
    table = table + 0.3 * sum(pairs[i, RESPONSES[:, i], RESPONSES[:, i + 1]] for i in range(LENGTH - 1))
    return (table + 0.2 * random.randn(len(RESPONSES))).astype(np.float32)


TABLE = _table()


def tokenizer():
    bare = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token=WORDS[0]))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=bare)


def texts(tokens, mask):
    return [
        " ".join(WORDS[token] for token in row[real])
        for row, real in zip(np.asarray(tokens), np.asarray(mask), strict=True)
    ]


def policy(seed=0, *, head="lm", scale=2.0, **changes):
    """A decoder of 2 layers. Its parameters are scaled so that its distribution is not flat."""
    config = config_from_hub(
        {
            "model_type": "llama",
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": False,
        }
    )
    model = Decoder(config.replace(**{"remat": "none", **changes}), head=head)
    params = jax.tree.map(lambda leaf: leaf * scale, init_params(model, jax.random.key(seed)))
    return Pretrained(model, params, tokenizer())


def prompts(rows, width=2):
    """Prompts that are the same in every row."""
    return Prompts(np.full((rows, width), 1, np.int32), np.ones((rows, width), bool), np.arange(rows, dtype=np.int32))


def table_reward(prompts, responses, **columns):
    del prompts, columns
    digits = np.array([[WORDS.index(word) for word in response.split()] for response in responses])
    return TABLE[digits @ (VOCAB ** np.arange(LENGTH - 1, -1, -1))]


@functools.partial(jax.jit, static_argnums=0)
def _response_logprobs(model, params):
    tokens = jnp.concatenate([jnp.ones((len(RESPONSES), 2), jnp.int32), jnp.asarray(RESPONSES, jnp.int32)], axis=1)
    logprobs = jax.nn.log_softmax(model.apply({"params": params}, tokens)[:, 1:-1])
    return jnp.sum(jnp.take_along_axis(logprobs, tokens[:, 2:, None], axis=-1), axis=(1, 2))


def response_logprobs(pretrained):
    """Exact log-probs of all 4,096 responses, float64."""
    return np.asarray(_response_logprobs(pretrained.model, pretrained.params), np.float64)


def objective(logprobs, ref_logprobs, beta):
    """(E[r] − β KL(π ‖ π_ref), KL), both exact."""
    probabilities = np.exp(logprobs)
    kl = np.sum(probabilities * (logprobs - ref_logprobs))
    return np.sum(probabilities * TABLE) - beta * kl, kl


def gain(pretrained, reference, beta):
    """(reached share of the possible gain in the objective over π_ref, KL)."""
    ref_logprobs = response_logprobs(reference)
    reached, kl = objective(response_logprobs(pretrained), ref_logprobs, beta)
    start, _ = objective(ref_logprobs, ref_logprobs, beta)
    best = beta * np.log(np.sum(np.exp(ref_logprobs + TABLE / beta)))
    return (reached - start) / (best - start), kl


EOS = 2
SECTIONS = ("sampling", "reward", "kl", "loss", "actor", "critic", "limits")


def nested(**settings):
    """PPO settings by short names, such as `kl_coef=0.1` or `max_new_tokens=4`, nested as in PPOConfig."""
    known, found = {field.name for field in dataclasses.fields(PPOConfig)}, {}
    for name, value in settings.items():
        path = name if name in known else new_name(f"ppo.{name}").removeprefix("ppo.")
        section, _, field = path.rpartition(".")
        (found.setdefault(section, {}) if section else found)[field] = value
    return found


def ppo_config(**settings):
    return from_mapping(PPOConfig, nested(**settings))


def changed(config, **settings):
    """The config with changed settings, by short names."""
    for name, value in nested(**settings).items():
        if isinstance(value, dict) and name in SECTIONS:
            value = dataclasses.replace(getattr(config, name), **value)
        config = dataclasses.replace(config, **{name: value})
    return config


def ragged_prompts(rows, width=5, seed=0):
    """Prompts of 1 to `width` tokens, EOS among them."""
    random = np.random.RandomState(seed)
    lengths = random.randint(1, width + 1, rows)
    lengths[0] = width
    mask = np.arange(width) >= width - lengths[:, None]
    return Prompts(random.randint(0, VOCAB, (rows, width)).astype(np.int32), mask, np.arange(rows, dtype=np.int32))


def fractional_reward(prompts, responses, **columns):
    del prompts, columns
    return [0.37 * response.count("w3") - 0.11 * response.count("w5") for response in responses]


def trainer(engine=None, *, reward=fractional_reward, **config):
    """A trainer for ragged responses. Its optimizers are linear in the gradient: Adam with a huge ε."""
    linear = {"learning_rate": 300.0, "eps": 1e3, "max_grad_norm": None, "beta1": 0.0, "beta2": 0.0}
    defaults = {
        "max_new_tokens": 6,
        "eos_ids": (EOS,),
        "pad_id": 0,
        "ppo_epochs": 1,
        "actor_optimizer": linear,
        "critic_optimizer": linear,
    }
    engine = engine or RLHFEngine(policy())
    return PPOTrainer(engine, nested(**(defaults | config)), reward_functions=reward or ())
