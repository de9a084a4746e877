"""Tokenizes texts: adds BOS and EOS, filters or truncates invalid and long rows, and counts the rows left out."""

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
_CHARACTERS_PER_FIRST_TOKEN = 8
"""Characters that are tokenized per wanted token of `first_tokens`; a token has about half as many on average."""
_ALWAYS_READ, _READ_PER_TOKEN = 1_000_000, 64
"""Characters of a text that are tokenized: so many at least, and so many per allowed token."""


@dataclasses.dataclass(frozen=True)
class Example:
    """A tokenized row.

    Attributes:
      prompt: int32[p], p may be 0.
      completions: int32[c] each: none for PPO, one for SFT, (chosen, rejected) for the reward model.
      margin: by how much the chosen answer is better, in reward units.
      columns: the row's other columns.
      has_prompt: whether the row has a prompt; BOS alone does not count.
      chat: the prompt's messages if it is a chat.
      continued: the chat ends within a turn of the assistant.
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
        """Tokens of all completions, each with the prompt before it."""
        return sum(len(self.prompt) + len(completion) for completion in self.completions)


def pad_id(tokenizer: PreTrainedTokenizerBase, config: DataConfig, vocab_size: int | None = None) -> int:
    """The id of the pad token.

    Args:
      tokenizer: the tokenizer.
      config: its `pad_token` replaces the tokenizer's own.
      vocab_size: the number of rows of the model's embedding; None = no check.

    Raises:
      DataError: there is no pad token, it is not in the vocabulary, or the model has no embedding for it.
    """
    token = config.pad_token or tokenizer.pad_token
    if token is None:
        raise DataError(
            f"the tokenizer has no pad token: set --config.data.pad_token={tokenizer.eos_token!r}. Any of its tokens "
            "will do, EOS too: masks are made from lengths, not from ids."
        )
    index = tokenizer.get_vocab().get(cast(str, token))
    if index is None:
        raise DataError(f"config.data.pad_token={token!r} is not in the tokenizer's vocabulary.")
    if vocab_size is not None and index >= vocab_size:
        raise DataError(
            f"the pad token {token!r} has the id {index}, but the model's embedding has only {vocab_size} rows: set "
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
    """Tokenizes rows, and filters or truncates those that are too long.

    A prompt gets BOS if the tokenizer adds BOS and the text has none. A completion ends with EOS, or another token that
    ends an answer.

    Prompt and completion are tokenized as one text, and the completion's tokens are those after the prompt's. If tokens
    would merge across the end of the prompt, both are tokenized separately: in PPO too, a completion is sampled after
    the prompt's tokens.

    Args:
      rows: the rows from which the texts are.
      texts: one per row.
      tokenizer: the tokenizer.
      config: limits of length, and what to do with invalid rows.
      dropped: reason → number of rows left out; updated in place.
      eos_ids: ids of tokens that end an answer. If a completion ends with none of them, the tokenizer's EOS is added if
        it is one of them, and otherwise the first.
      vocab_size: the number of rows of the model's embedding; None = no check.

    Returns:
      The examples of the rows that are not left out.

    Raises:
      DataError: a row is invalid and on_bad_row="error", or the model has no embedding for a token.
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
        prompt = prompts[index] if text.templated else _with_bos(prompts[index], bos)
        answers = [_with_eos(answer[index], eos_ids, added) for answer in completions]
        if bos and not (prompts[index] or text.templated):  # a text rendered beforehand may begin with BOS itself
            answers = [answer[len(bos) :] if answer[: len(bos)] == bos else answer for answer in answers]
        example = _fitted(prompt, answers, config, dropped, bos)
        if example is not None:
            _check_ids(example, rows[index], tokenizer, vocab_size)
            fields = {"margin": text.margin, "columns": text.columns, "chat": text.chat}
            fields["continued"] = text.continued
            fields["has_prompt"] = bool(text.prompt.strip())
            examples.append(dataclasses.replace(example, **fields))
    return examples


def _check_ids(example: Example, row: Row, tokenizer: PreTrainedTokenizerBase, vocab_size: int | None) -> None:
    ids = np.concatenate([example.prompt, *example.completions])
    if vocab_size is None or ids.max(initial=0) < vocab_size:
        return
    index = int(ids[ids >= vocab_size][0])
    raise DataError(
        f"{row.where}: token {tokenizer.convert_ids_to_tokens(index)!r} has the id {index}, but the model's embedding "
        f"has only {vocab_size} rows. Tokens were added to the tokenizer but not to the model: use the tokenizer files "
        "of the checkpoint itself, or a checkpoint with a resized embedding."
    )


def first_tokens(texts: Sequence[Texts], tokenizer: PreTrainedTokenizerBase, count: int) -> list[np.ndarray]:
    """The first tokens of prompts, as the PPO phase uses them with `prompt_tokens`.

    Args:
      texts: the texts, one per row.
      tokenizer: the tokenizer.
      count: the number of tokens, with BOS.

    Returns:
      int32[count] each; fewer for short texts.
    """
    # Long texts are cut first, to save time. If so many characters make fewer tokens, equal beginnings stay equal.
    begins = [_SURROGATE.sub("?", text.prompt[: count * _CHARACTERS_PER_FIRST_TOKEN]) for text in texts]
    prompts, bos = token_ids(begins, tokenizer), _bos(tokenizer)
    return [
        _array((prompt if text.templated else _with_bos(prompt, bos))[:count])
        for text, prompt in zip(texts, prompts, strict=True)
    ]


def _is_bad(row: Row, text: Texts, config: DataConfig, dropped: collections.Counter) -> bool:
    """Whether a row is left out or invalid; counts the reason."""
    if text.left_out:
        dropped[text.left_out] += 1
        return True
    problem, detail = None, ""
    lone = next((part for part in (text.prompt, *text.completions) if _SURROGATE.search(part)), None)
    if lone is not None:
        problem, detail = "half of a surrogate pair, which is not a character", f", in {lone[:80]!r}"
    elif text.unwritten:
        problem = "the chat template leaves out a part of the answer"
        detail = (
            f", {text.unwritten[:80]!r}, which would not be learned; put a chat_template.jinja that renders it into "
            "the checkpoint's folder"
        )
    elif any(not completion.strip() for completion in text.completions):
        problem = "an empty completion"
    elif len(text.completions) == 2 and text.completions[0] == text.completions[1]:
        problem = "chosen and rejected are the same"
    if problem and config.on_bad_row == "error":
        raise DataError(
            f"{row.where}: {problem}{detail}. Fix or remove the row, or leave out (and count) all such rows with "
            "--config.data.on_bad_row=drop."
        )
    if problem:
        dropped[problem] += 1
    return problem is not None


def _within_reach(text: Texts, config: DataConfig, dropped: collections.Counter) -> Texts | None:
    """The text, shortened before tokenization if it is far too long; None if it is filtered.

    Tokens take twenty times the memory of the text, and only the first or last of them would be used.
    """
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
    """(the longest prompt of PPO in tokens, the reason for leaving out longer ones)."""
    return config.prompt_width, f"a prompt longer than max_prompt_tokens={config.max_prompt_tokens}"


def _completions(
    texts: Sequence[Texts], prompts: list[list[int]], index: int, tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """The ids of each row's completion, tokenized with the prompt before it.

    A sentencepiece tokenizer would begin a completion that is tokenized alone with a space.
    """
    separate = token_ids([text.completions[index] for text in texts], tokenizer)
    joint = token_ids([text.prompt + text.completions[index] for text in texts], tokenizer)
    return [
        whole[len(prompt) :] if whole[: len(prompt)] == prompt else alone
        for whole, prompt, alone in zip(joint, prompts, separate, strict=True)
    ]


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [cast(int, tokenizer.bos_token_id)] if begins_with_bos(tokenizer) else []


def _with_bos(prompt: list[int], bos: list[int]) -> list[int]:
    """The prompt with BOS at its beginning, once."""
    return prompt if prompt[: len(bos)] == bos else bos + prompt


def _with_eos(completion: list[int], eos_ids: Sequence[int], added: list[int]) -> list[int]:
    """The completion up to its EOS, as sampling would end it.

    Text that a chat template writes after EOS (a line break) is cut, and a missing EOS is added.
    """
    for position in range(max(0, len(completion) - 3), len(completion)):
        if completion[position] in eos_ids:
            return completion[: position + 1]
    return completion + added


def _fitted(
    prompt: list[int], answers: list[list[int]], config: DataConfig, dropped: collections.Counter, bos: list[int]
) -> Example | None:
    """The example within the limits of length; None if it is left out, for a reason that is counted in `dropped`."""
    cut = config.too_long == "truncate"
    begin = bos if bos and prompt[:1] == bos else []  # kept when the prompt is cut
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
        dropped["a single token, with no token before it"] += 1
        return None
    return Example(_array(prompt), tuple(_array(answer) for answer in answers))


def _last(prompt: list[int], count: int, begin: list[int]) -> list[int]:
    """The last `count` tokens of a prompt, of which the first are replaced by `begin` (BOS) if any are cut."""
    if len(prompt) <= count:
        return prompt
    rest = count - len(begin)
    return [*begin, *prompt[len(prompt) - rest :]] if rest > 0 else prompt[len(prompt) - count :]


def _array(ids: list[int]) -> np.ndarray:
    return np.asarray(ids, np.int32)
