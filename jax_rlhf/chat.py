"""`python -m jax_rlhf.chat MODEL`: chats with a model, line by line.

A model without a chat template continues the text of each line.
"""

import collections
import itertools
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging

from jax_rlhf.data import DataConfig, pad_id
from jax_rlhf.data.formats import row_texts
from jax_rlhf.data.sources import Row
from jax_rlhf.data.tokens import tokenized
from jax_rlhf.hub import CheckpointError, Pretrained, decode, end_ids, tokenizer_of
from jax_rlhf.hub.config import ModelConfig
from jax_rlhf.hub.load_model import load_model, sampled_ids
from jax_rlhf.io.printable import printable_lines
from jax_rlhf.io.terminal import make_output_harmless
from jax_rlhf.sampling import sample

_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "The longest answer, in tokens.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "0 = the most likely token (greedy).", lower_bound=0.0)
_SEED = flags.DEFINE_integer("seed", 0, "The random seed of sampling.")
_LONGEST = 1 << 20  # tokens; large enough that a chat is never filtered
_WIDTHS = 64  # tokens; prompts are padded to a multiple of it, so that not every line needs a new compilation


def answer(pretrained: Pretrained, messages: list[dict[str, Any]], key: jax.Array, **keywords: Any) -> str:
    """Samples a model's answer.

    Args:
      pretrained: the model, with a tokenizer.
      messages: the chat so far; without a chat template the model continues the text of the last message.
      key: a JAX random key.
      keywords: `max_new_tokens` and other arguments of `sample`.

    Returns:
      The answer, without special tokens.

    Raises:
      ValueError: the chat is longer than the model's table of positions, or the chat template fails.
    """
    tokenizer, decoder = tokenizer_of(pretrained), pretrained.model.config
    if tokenizer.chat_template is None:
        row = Row({"prompt": messages[-1]["content"]}, "the line", len(messages))
    else:
        row = Row({"prompt": messages}, "the chat", len(messages))
    data, ends = DataConfig(max_prompt_tokens=_LONGEST), end_ids(tokenizer, pretrained.generation_config)
    dropped: collections.Counter = collections.Counter()
    texts = [row_texts(row, "ppo", data, tokenizer)]  # as a prompt of PPO: with BOS, without EOS
    examples = tokenized([row], texts, tokenizer, data, dropped, ends)
    if not examples:
        raise ValueError(f"the prompt is not valid: {', '.join(dropped)}.")
    ids = examples[0].prompt
    width = -(-len(ids) // _WIDTHS) * _WIDTHS
    if decoder.position_kind == "learned":
        width, room = len(ids), decoder.max_positions - len(ids)
        if room < 1:
            raise ValueError(f"the chat has {len(ids)} tokens, but the model only {decoder.max_positions} positions.")
        keywords["max_new_tokens"] = min(keywords["max_new_tokens"], room)
    pad = pad_id(tokenizer, DataConfig(pad_token=str(tokenizer.pad_token or tokenizer.eos_token)))
    prompt = np.full((1, width), pad)
    prompt[0, width - len(ids) :] = ids
    mask = np.arange(width)[None] >= width - len(ids)
    model = pretrained.model.clone(config=sampled_ids(pretrained.model.config, tokenizer))
    samples = sample(model, pretrained.params, prompt, mask, key, eos_id=ends, **keywords)
    response = np.asarray(samples.tokens)[0, width:][np.asarray(samples.response_mask)[0]]
    return decode(tokenizer, response)


def main(arguments: Sequence[str]) -> int:
    """Answers lines from standard input until its end.

    Args:
      arguments: the program and the model.

    Returns:
      The exit code: 0, 1 if the model cannot be loaded, or 2 for wrong usage.
    """
    if len(arguments) != 2:
        print("usage: python -m jax_rlhf.chat MODEL [--max_new_tokens=256] [--temperature=1.0]", file=sys.stderr)
        return 2
    make_output_harmless()
    logging.set_verbosity(logging.WARNING)  # at INFO JAX reports each missing device
    try:
        pretrained = load_model(ModelConfig(path=arguments[1]), "lm")
        if pretrained.tokenizer is None:
            raise CheckpointError(f"{arguments[1]} has no tokenizer; add the tokenizer's files to its folder.")
    except (FileNotFoundError, ValueError, CheckpointError) as error:
        print(f"error: {printable_lines(str(error))}", file=sys.stderr)
        return 1
    keywords = {"max_new_tokens": _MAX_NEW_TOKENS.value, "temperature": _TEMPERATURE.value or 1.0}
    keywords |= {} if _TEMPERATURE.value else {"top_k": 1}
    messages: list[dict[str, Any]] = []
    for turn in itertools.count():
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            return 0
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        try:
            response = answer(pretrained, messages, jax.random.fold_in(jax.random.key(_SEED.value), turn), **keywords)
        except ValueError as error:
            print(f"error: {printable_lines(str(error))}", file=sys.stderr)
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": response})
        print(printable_lines(response), flush=True)
    raise AssertionError("unreachable")


def run() -> None:
    """The command `jax-rlhf chat MODEL`."""
    app.run(main)


if __name__ == "__main__":
    run()
