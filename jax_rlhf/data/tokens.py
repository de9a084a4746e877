"""From texts to token ids: BOS and EOS, empty and long rows, and how many rows each filter left out."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from jax_rlhf.data.config import DataConfig
from jax_rlhf.data.errors import DataError
from jax_rlhf.data.formats import Texts
from jax_rlhf.data.sources import Row


@dataclasses.dataclass(frozen=True)
class Example:
    """A row in tokens.

    Attributes:
      prompt: int32[p], p may be 0.
      completions: int32[c] each: none for PPO, one for SFT, (chosen, rejected) for the reward model.
      margin: in reward units.
      columns: the row's other columns.
    """

    prompt: np.ndarray
    completions: tuple[np.ndarray, ...]
    margin: float = 0.0
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def length(self) -> int:
        """Tokens of the prompt and the longest completion."""
        return len(self.prompt) + max((len(completion) for completion in self.completions), default=0)

    @property
    def total_length(self) -> int:
        """Tokens of all its texts, each with the prompt before it."""
        return sum(len(self.prompt) + len(completion) for completion in self.completions)


def pad_id(tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> int:
    """The id that stands at pads.

    Args:
      tokenizer: the tokenizer.
      config: its `pad_token` is for tokenizers that have none.

    Returns:
      The id.

    Raises:
      DataError: there is no pad token, or not that one.
    """
    token = config.pad_token or tokenizer.pad_token
    if token is None:
        raise DataError(
            f"the tokenizer has no pad token: set --config.data.pad_token={tokenizer.eos_token!r}. Any of its tokens "
            "will do, EOS too: which tokens are pads is known from lengths, never from ids."
        )
    index = tokenizer.get_vocab().get(token)
    if index is None:
        raise DataError(f"config.data.pad_token={token!r} is not in the tokenizer's vocabulary.")
    return index


def tokenized(
    rows: Sequence[Row],
    texts: Sequence[Texts],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    dropped: collections.Counter,
) -> list[Example]:
    """Tokenizes rows, and drops or cuts what is too long.

    A prompt gets the tokenizer's BOS where the tokenizer would put one; a completion ends with EOS. The two are
    tokenized apart, as in PPO, where the completion is sampled after the prompt's tokens.

    Args:
      rows: where the texts are from.
      texts: one each.
      tokenizer: the tokenizer.
      config: limits.
      dropped: reason → rows, added to.

    Returns:
      The examples that stay.

    Raises:
      DataError: an empty completion, or chosen = rejected, with on_bad_row="error".
    """
    kept = [i for i, (row, text) in enumerate(zip(rows, texts, strict=True)) if not _is_bad(row, text, config, dropped)]
    rows, texts = [rows[i] for i in kept], [texts[i] for i in kept]
    prompts = _ids([text.prompt for text in texts], tokenizer)
    count = len(texts[0].completions) if texts else 0
    completions = [_ids([text.completions[i] for text in texts], tokenizer) for i in range(count)]
    bos = _bos(tokenizer)
    examples = []
    for index, text in enumerate(texts):
        prompt = prompts[index] if text.templated else bos + prompts[index]
        answers = [_ended(answer[index], tokenizer.eos_token_id) for answer in completions]
        example = _fitted(prompt, answers, config, dropped)
        if example is not None:
            examples.append(dataclasses.replace(example, margin=text.margin, columns=text.columns))
    return examples


def _is_bad(row: Row, text: Texts, config: DataConfig, dropped: collections.Counter) -> bool:
    problem = None
    if any(not completion.strip() for completion in text.completions):
        problem = "an empty completion"
    elif len(text.completions) == 2 and text.completions[0] == text.completions[1]:
        problem = "chosen and rejected are the same"
    if problem and config.on_bad_row == "error":
        raise DataError(
            f"{row.where}: {problem}. Mend or remove the row, or drop (and count) all such rows with "
            "--config.data.on_bad_row=drop."
        )
    if problem:
        dropped[problem] += 1
    return problem is not None


def _ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    first = tokenizer("a")["input_ids"][:1]
    return first if first and first[0] == tokenizer.bos_token_id else []


def _ended(completion: list[int], eos: int | None) -> list[int]:
    """Ends with EOS: what a chat template writes after the last one (a line break) is cut, one that lacks is added."""
    if eos is None:
        return completion
    tail = completion[-3:]
    if eos in tail:
        return completion[: len(completion) - tail[::-1].index(eos)]
    return [*completion, eos]


def _fitted(
    prompt: list[int], answers: list[list[int]], config: DataConfig, dropped: collections.Counter
) -> Example | None:
    cut = config.too_long == "truncate"
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
            dropped[f"a prompt longer than max_prompt_tokens={config.max_prompt_tokens}"] += 1
            return None
        return Example(_array(prompt[-config.max_prompt_tokens :]), ())
    if len(prompt) + max(map(len, answers)) > config.max_tokens:
        if not cut:
            dropped[f"longer than max_tokens={config.max_tokens}"] += 1
            return None
        prompt = prompt[-min(config.max_prompt_tokens, config.max_tokens - 1) :]
        answers = [answer[: config.max_tokens - len(prompt)] for answer in answers]
        if len(answers) == 2 and answers[0] == answers[1]:
            dropped["chosen and rejected are the same after cutting"] += 1
            return None
    if len(prompt) + min(map(len, answers)) < 2:
        dropped["a single token, before which nothing stands"] += 1
        return None
    return Example(_array(prompt), tuple(_array(answer) for answer in answers))


def _array(ids: list[int]) -> np.ndarray:
    return np.asarray(ids, np.int32)
