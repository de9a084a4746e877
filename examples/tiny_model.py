"""A tiny language model with random weights, for examples that run offline in seconds."""

from collections.abc import Sequence

import jax
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jax_rlhf import Pretrained
from jax_rlhf.hub import config_from_hub
from jax_rlhf.models import Decoder, init_params


def create(words: Sequence[str], *, seed: int = 0, scale: float = 1.0, **special: str) -> Pretrained:
    """A Llama of 2 layers whose tokens are whole words.

    Args:
      words: the vocabulary; the id of a word is its index.
      seed: seed of the weights.
      scale: factor on the weights; with 1 all words are almost equally likely, with a larger factor some are likelier.
      special: the words with a special meaning, such as eos_token="<eos>".

    Returns:
      The model with its parameters and its tokenizer.
    """
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = config_from_hub({"model_type": "llama", "vocab_size": len(words), "max_position_embeddings": 64, **shape})
    model = Decoder(config.replace(remat="none"), head="lm")
    params = jax.tree.map(lambda leaf: leaf * scale, init_params(model, jax.random.key(seed)))

    ids = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Pretrained(model, params, PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special))
