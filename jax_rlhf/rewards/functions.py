"""Reward functions over texts: other people's Python, with what it returns checked."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

ScoreTexts = Callable[..., Sequence[float] | np.ndarray]


class RewardError(ValueError):
    """A reward source returned something that is no reward; the message names it and shows the text."""


@dataclasses.dataclass(frozen=True)
class RewardFunction:
    """A Python function as a source of rewards.

    Attributes:
      function: f(prompts: list[str], responses: list[str], **columns) → float[B], columns being the data set's others.
      weight: its score is multiplied by this before sources are summed.
      name: for messages; default: the function's own.
    """

    function: ScoreTexts
    weight: float = 1.0
    name: str | None = None

    def __call__(self, prompts: list[str], responses: list[str], columns: Mapping[str, Sequence[Any]]) -> np.ndarray:
        """Scores texts.

        Args:
          prompts: B texts.
          responses: B texts, without special tokens.
          columns: the data set's other columns, B entries each.

        Returns:
          float32[B], weighted.

        Raises:
          RewardError: not B finite numbers.
        """
        name = self.name or getattr(self.function, "__name__", type(self.function).__name__)
        try:
            scores = np.asarray(self.function(prompts, responses, **columns), dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise RewardError(
                f"reward function {name!r} failed, or did not return numbers: {type(error).__name__}: {error}. It is "
                f"called as {name}(prompts, responses{''.join(f', {column}=…' for column in columns)}) and returns a "
                f"float for each of {len(responses)} responses."
            ) from error
        if scores.shape != (len(responses),):
            raise RewardError(
                f"reward function {name!r} returned shape {list(scores.shape)} for {len(responses)} responses; one "
                f"float each is expected. The first response was {responses[0]!r}."
            )
        wrong = np.flatnonzero(~np.isfinite(scores))
        if len(wrong):
            row = int(wrong[0])
            raise RewardError(
                f"reward function {name!r} returned {scores[row]} for {len(wrong)} of {len(responses)} responses, "
                f"first for row {row}: prompt {prompts[row]!r}, response {responses[row]!r}."
            )
        return self.weight * scores


def score_texts(
    functions: Sequence[RewardFunction],
    prompts: list[str],
    responses: list[str],
    columns: Mapping[str, Sequence[Any]],
) -> np.ndarray:
    """The weighted sum of several functions' scores.

    Args:
      functions: one or more.
      prompts, responses: B texts each.
      columns: the data set's other columns, B entries each.

    Returns:
      float32[B].

    Raises:
      RewardError: a function did not return B finite numbers.
    """
    return np.sum([function(prompts, responses, columns) for function in functions], axis=0, dtype=np.float32)
