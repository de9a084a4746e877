"""`python -m jax_rlhf.chat MODEL`: asks a model line by line, with its chat template where it has one.

A model without a template goes on with each line as it stands.
"""

import collections
import itertools
import sys
from collections.abc import Sequence
from typing import Any, cast

import jax
import numpy as np
from absl import app, flags, logging

from jax_rlhf.data import DataConfig, pad_id
from jax_rlhf.data.formats import row_texts
from jax_rlhf.data.sources import Row
from jax_rlhf.data.tokens import tokenized
from jax_rlhf.hub import CheckpointError, Pretrained, end_ids
from jax_rlhf.hub.model_config import ModelConfig, load_model, sampled_ids
from jax_rlhf.io.printable import printable_lines
from jax_rlhf.io.terminal import make_output_harmless
from jax_rlhf.sampling import sample

_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "The longest answer, in tokens.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "0 takes the likeliest token each time.", lower_bound=0.0)
_SEED = flags.DEFINE_integer("seed", 0, "Of the answers.")
_LONGEST = 1 << 20  # tokens; a chat is not cut
_WIDTHS = 64  # tokens; prompts are padded to a multiple, so that not every line compiles anew


def answer(pretrained: Pretrained, messages: list[dict[str, Any]], key: jax.Array, **how: Any) -> str:
    """What a model answers.

    Args:
      pretrained: with a tokenizer.
      messages: the chat so far; without a chat template the last one's text is gone on with.
      key: of the draw.
      how: `max_new_tokens` and other settings of `sample`.

    Returns:
      The answer, without special tokens.

    Raises:
      ValueError: the chat leaves no room in a table of positions, or its template fails.
    """
    tokenizer, decoder = pretrained.tokenizer, pretrained.model.config
    assert tokenizer is not None, "who calls this looks first"
    if tokenizer.chat_template is None:
        row = Row({"prompt": messages[-1]["content"]}, "the line", len(messages))
    else:
        row = Row({"prompt": messages}, "the chat", len(messages))
    data, ends = DataConfig(max_prompt_tokens=_LONGEST), end_ids(tokenizer, pretrained.generation_config)
    dropped: collections.Counter = collections.Counter()
    texts = [row_texts(row, "ppo", data, tokenizer)]  # as in PPO: with BOS, without EOS
    examples = tokenized([row], texts, tokenizer, data, dropped, ends)
    if not examples:
        raise ValueError(f"there is nothing to go on with: {', '.join(dropped)}.")
    ids = examples[0].prompt
    width = -(-len(ids) // _WIDTHS) * _WIDTHS
    if decoder.position_kind == "learned":
        width, room = len(ids), decoder.max_positions - len(ids)
        if room < 1:
            raise ValueError(f"the chat has {len(ids)} tokens, and the model {decoder.max_positions} positions.")
        how["max_new_tokens"] = min(how["max_new_tokens"], room)
    pad_token = cast(str | None, tokenizer.pad_token or tokenizer.eos_token)
    prompt = np.full((1, width), pad_id(tokenizer, DataConfig(pad_token=pad_token)))
    prompt[0, width - len(ids) :] = ids
    mask = np.arange(width)[None] >= width - len(ids)
    model = pretrained.model.clone(config=sampled_ids(pretrained.model.config, tokenizer))
    samples = sample(model, pretrained.params, prompt, mask, key, eos_id=ends, **how)
    response = np.asarray(samples.tokens)[0, width:][np.asarray(samples.response_mask)[0]]
    return cast(str, tokenizer.decode(response, skip_special_tokens=True))


def main(arguments: Sequence[str]) -> int:
    """Reads lines until there are no more.

    Args:
      arguments: the program and the model.

    Returns:
      The exit code: 0, or 1 where the model cannot be used.
    """
    if len(arguments) != 2:
        print("usage: python -m jax_rlhf.chat MODEL [--max_new_tokens=256] [--temperature=1.0]", file=sys.stderr)
        return 2
    make_output_harmless()
    logging.set_verbosity(logging.WARNING)  # at INFO JAX reports each missing device
    try:
        pretrained = load_model(ModelConfig(path=arguments[1]), "lm")
        assert pretrained is not None, "there is a path"
        if pretrained.tokenizer is None:
            raise CheckpointError(f"{arguments[1]} came without a tokenizer.")
    except (FileNotFoundError, ValueError, CheckpointError) as error:
        print(f"error: {printable_lines(str(error))}", file=sys.stderr)
        return 1
    how = {"max_new_tokens": _MAX_NEW_TOKENS.value, "temperature": _TEMPERATURE.value or 1.0}
    how |= {} if _TEMPERATURE.value else {"top_k": 1}
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
            said = answer(pretrained, messages, jax.random.fold_in(jax.random.key(_SEED.value), turn), **how)
        except ValueError as error:
            print(f"error: {printable_lines(str(error))}", file=sys.stderr)
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": said})
        print(printable_lines(said), flush=True)
    raise AssertionError("unreachable")


if __name__ == "__main__":
    app.run(main)
