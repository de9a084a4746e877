"""From texts to token ids: BOS and EOS, empty and long rows, and how many rows each filter left out."""

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from jax_rlhf.data.chats import Message
from jax_rlhf.data.config import DataConfig
from jax_rlhf.data.data_error import DataError
from jax_rlhf.data.formats import Texts
from jax_rlhf.data.sources import Row
from jax_rlhf.data.special_tokens import begins_with_bos, token_ids

_SURROGATE = re.compile(r"[\ud800-\udfff]")
_OPENING_CHARACTERS = 8
"""Read for each token of an opening; on average a token has about half as many."""
_ALWAYS_READ, _READ_PER_TOKEN = 1_000_000, 64
"""Characters of a text: so many are tokenized in any case, and so many for each token that is allowed."""


@dataclasses.dataclass(frozen=True)
class Example:
    """A row in tokens.

    Attributes:
      prompt: int32[p], p may be 0.
      completions: int32[c] each: none for PPO, one for SFT, (chosen, rejected) for the reward model.
      margin: in reward units.
      columns: the row's other columns.
      has_prompt: whether the row has one; BOS alone is none.
      chat: the prompt's messages, where it is a chat.
      continued: it ends within a turn of the assistant.
    """

    prompt: np.ndarray
    completions: tuple[np.ndarray, ...]
    margin: float = 0.0
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    has_prompt: bool = True
    chat: list[Message] | None = None
    continued: bool = False

    @property
    def length(self) -> int:
        """Tokens of the prompt and the longest completion."""
        return len(self.prompt) + max((len(completion) for completion in self.completions), default=0)

    @property
    def total_length(self) -> int:
        """Tokens of all its texts, each with the prompt before it."""
        return sum(len(self.prompt) + len(completion) for completion in self.completions)


def pad_id(tokenizer: PreTrainedTokenizerBase, config: DataConfig, vocab_size: int | None = None) -> int:
    """The id that stands at pads.

    Args:
      tokenizer: the tokenizer.
      config: its `pad_token` is for tokenizers that have none.
      vocab_size: how many ids the model knows; None = it is not looked at.

    Returns:
      The id.

    Raises:
      DataError: there is no pad token, or not that one, or the model has no embedding for it.
    """
    token = config.pad_token or tokenizer.pad_token
    if token is None:
        raise DataError(
            f"the tokenizer has no pad token: set --config.data.pad_token={tokenizer.eos_token!r}. Any of its tokens "
            "will do, EOS too: which tokens are pads is known from lengths, never from ids."
        )
    index = tokenizer.get_vocab().get(cast(str, token))
    if index is None:
        raise DataError(f"config.data.pad_token={token!r} is not in the tokenizer's vocabulary.")
    if vocab_size is not None and index >= vocab_size:
        raise DataError(
            f"the pad token {token!r} has the id {index}, and the model's embedding has {vocab_size} rows: take "
            f"another, such as --config.data.pad_token={tokenizer.eos_token!r}. Any of the model's tokens will do."
        )
    return index


def tokenized(
    rows: Sequence[Row],
    texts: Sequence[Texts],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    dropped: collections.Counter,
    eos_ids: Sequence[int],
    *,
    vocab_size: int | None = None,
) -> list[Example]:
    """Tokenizes rows, and drops or cuts what is too long.

    A prompt gets the tokenizer's BOS where the tokenizer would put one and the text has none; a completion ends with
    EOS, or with what else ends an answer. Its tokens are those that follow the prompt's when both are tokenized
    together; where the two would merge, they are tokenized apart, as in PPO, where a completion is sampled after the
    prompt's tokens.

    Args:
      rows: where the texts are from.
      texts: one each.
      tokenizer: the tokenizer.
      config: limits.
      dropped: reason → rows, added to.
      eos_ids: tokens that end an answer; where none is there, the tokenizer's EOS is added (if it is one of them, or
        else the first).
      vocab_size: how many ids the model knows; None = it is not looked at.

    Returns:
      The examples that stay.

    Raises:
      DataError: a bad row with on_bad_row="error", or a token that the model has no embedding for.
    """
    kept = [i for i, (row, text) in enumerate(zip(rows, texts, strict=True)) if not _is_bad(row, text, config, dropped)]
    within = [(rows[i], text) for i in kept if (text := _within_reach(texts[i], config, dropped)) is not None]
    rows, texts = [row for row, _ in within], [text for _, text in within]
    prompts = token_ids([text.prompt for text in texts], tokenizer)
    count = len(texts[0].completions) if texts else 0
    completions = [_completions(texts, prompts, i, tokenizer) for i in range(count)]
    bos = _bos(tokenizer)
    eos_id = cast(int, tokenizer.eos_token_id)
    added = [eos_id] if eos_id in eos_ids else list(eos_ids[:1])
    examples = []
    for index, text in enumerate(texts):
        prompt = prompts[index] if text.templated else _begun(prompts[index], bos)
        answers = [_ended(answer[index], eos_ids, added) for answer in completions]
        if bos and not (prompts[index] or text.templated):  # a text that was templated beforehand may have it
            answers = [answer[len(bos) :] if answer[: len(bos)] == bos else answer for answer in answers]
        example = _fitted(prompt, answers, config, dropped, bos)
        if example is not None:
            _check_ids(example, rows[index], tokenizer, vocab_size)
            more = {"margin": text.margin, "columns": text.columns, "chat": text.chat}
            more["continued"] = text.continued
            more["has_prompt"] = bool(text.prompt.strip())
            examples.append(dataclasses.replace(example, **more))
    return examples


def _check_ids(example: Example, row: Row, tokenizer: PreTrainedTokenizerBase, vocab_size: int | None) -> None:
    ids = np.concatenate([example.prompt, *example.completions])
    if vocab_size is None or ids.max(initial=0) < vocab_size:
        return
    index = int(ids[ids >= vocab_size][0])
    raise DataError(
        f"{row.where}: token {tokenizer.convert_ids_to_tokens(index)!r} has the id {index}, and the model's embedding "
        f"has {vocab_size} rows. The tokenizer was given tokens that the model has not learned: take the tokenizer "
        "files of the checkpoint itself, or a checkpoint whose embedding was made larger with them."
    )


def openings(texts: Sequence[Texts], tokenizer: PreTrainedTokenizerBase, count: int) -> list[np.ndarray]:
    """The first tokens of prompts, as the PPO phase takes them with `prompt_tokens`.

    Args:
      texts: one each.
      tokenizer: the tokenizer.
      count: at most so many tokens, BOS among them.

    Returns:
      int32[count] each, or fewer.
    """
    # The rest of long texts would take long. Where tokens are longer than that, texts of one opening stay alike.
    begins = [_SURROGATE.sub("?", text.prompt[: count * _OPENING_CHARACTERS]) for text in texts]
    prompts, bos = token_ids(begins, tokenizer), _bos(tokenizer)
    return [
        _array((prompt if text.templated else _begun(prompt, bos))[:count])
        for text, prompt in zip(texts, prompts, strict=True)
    ]


def _is_bad(row: Row, text: Texts, config: DataConfig, dropped: collections.Counter) -> bool:
    """Whether a row is not learned from; counts why."""
    if text.left_out:
        dropped[text.left_out] += 1
        return True
    problem, detail = None, ""
    lone = next((part for part in (text.prompt, *text.completions) if _SURROGATE.search(part)), None)
    if lone is not None:
        problem, detail = "half of a surrogate pair, which is no character", f", in {lone[:80]!r}"
    elif text.unwritten:
        problem = "the chat template leaves out a part of the answer"
        detail = (
            f", {text.unwritten[:80]!r}, which would not be learned; a chat_template.jinja in the checkpoint's folder "
            "can write it"
        )
    elif any(not completion.strip() for completion in text.completions):
        problem = "an empty completion"
    elif len(text.completions) == 2 and text.completions[0] == text.completions[1]:
        problem = "chosen and rejected are the same"
    if problem and config.on_bad_row == "error":
        raise DataError(
            f"{row.where}: {problem}{detail}. Mend or remove the row, or drop (and count) all such rows with "
            "--config.data.on_bad_row=drop."
        )
    if problem:
        dropped[problem] += 1
    return problem is not None


def _within_reach(text: Texts, config: DataConfig, dropped: collections.Counter) -> Texts | None:
    """What is tokenized of a text: tokens take twenty times its memory, and of a book only the first or last count."""
    longest, reason = config.max_tokens, f"longer than max_tokens={config.max_tokens}"
    if not text.completions:
        longest, reason = _longest_prompt(config)
    most = max(_ALWAYS_READ, longest * _READ_PER_TOKEN)
    if len(text.prompt) + max(map(len, text.completions), default=0) <= most:
        return text
    if not text.completions and config.prompt_tokens is not None:
        return dataclasses.replace(text, prompt=text.prompt[:most])
    if config.too_long == "filter":
        dropped[reason] += 1
        return None
    answers = tuple(completion[:most] for completion in text.completions)
    return dataclasses.replace(text, prompt=text.prompt[-most:], completions=answers)


def _longest_prompt(config: DataConfig) -> tuple[int, str]:
    """(PPO's longest prompt in tokens, what is said of a longer one)."""
    longest = config.max_prompt_tokens if config.prompt_tokens is None else config.prompt_tokens
    return longest, f"a prompt longer than max_prompt_tokens={config.max_prompt_tokens}"


def _completions(
    texts: Sequence[Texts], prompts: list[list[int]], index: int, tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """The ids of each row's completion: a sentencepiece tokenizer would begin one that stands alone with a space."""
    apart = token_ids([text.completions[index] for text in texts], tokenizer)
    together = token_ids([text.prompt + text.completions[index] for text in texts], tokenizer)
    return [
        whole[len(prompt) :] if whole[: len(prompt)] == prompt else alone
        for whole, prompt, alone in zip(together, prompts, apart, strict=True)
    ]


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [cast(int, tokenizer.bos_token_id)] if begins_with_bos(tokenizer) else []


def _begun(prompt: list[int], bos: list[int]) -> list[int]:
    """With BOS, once."""
    return prompt if prompt[: len(bos)] == bos else bos + prompt


def _ended(completion: list[int], eos_ids: Sequence[int], added: list[int]) -> list[int]:
    """Ends where sampling would: what a chat template writes after that (a line break) is cut, a lack made up."""
    for place in range(max(0, len(completion) - 3), len(completion)):
        if completion[place] in eos_ids:
            return completion[: place + 1]
    return completion + added


def _fitted(
    prompt: list[int], answers: list[list[int]], config: DataConfig, dropped: collections.Counter, bos: list[int]
) -> Example | None:
    cut = config.too_long == "truncate"
    begin = bos if bos and prompt[:1] == bos else []  # stays when the prompt is cut
    if not answers:  # PPO
        if config.prompt_tokens is not None:
            if len(prompt) < config.prompt_tokens:
                dropped[f"shorter than prompt_tokens={config.prompt_tokens}"] += 1
                return None
            prompt = prompt[: config.prompt_tokens]
        if not prompt:
            dropped["an empty prompt"] += 1
            return None
        if len(prompt) > config.max_prompt_tokens and not cut:
            dropped[_longest_prompt(config)[1]] += 1
            return None
        return Example(_array(_last(prompt, config.max_prompt_tokens, begin)), ())
    if len(prompt) + max(map(len, answers)) > config.max_tokens:
        if not cut:
            dropped[f"longer than max_tokens={config.max_tokens}"] += 1
            return None
        prompt = _last(prompt, min(config.max_prompt_tokens, config.max_tokens - 1), begin)
        answers = [answer[: config.max_tokens - len(prompt)] for answer in answers]
        if len(answers) == 2 and answers[0] == answers[1]:
            dropped["chosen and rejected are the same after cutting"] += 1
            return None
    if len(prompt) + min(map(len, answers)) < 2:
        dropped["a single token, before which nothing stands"] += 1
        return None
    return Example(_array(prompt), tuple(_array(answer) for answer in answers))


def _last(prompt: list[int], count: int, begin: list[int]) -> list[int]:
    """At most so many tokens: what the prompt begins with, and the end of the rest."""
    if len(prompt) <= count:
        return prompt
    rest = count - len(begin)
    return [*begin, *prompt[len(prompt) - rest :]] if rest > 0 else prompt[len(prompt) - count :]


def _array(ids: list[int]) -> np.ndarray:
    return np.asarray(ids, np.int32)
