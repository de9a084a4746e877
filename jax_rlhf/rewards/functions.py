"""Reward functions over texts: other people's Python, with what it returns checked."""

import dataclasses
import math
import queue
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from absl import logging

from jax_rlhf.text import printable

ScoreTexts = Callable[..., Sequence[float] | np.ndarray]

_HANGING = 16  # calls that never ended, after which it is no use to begin another


class RewardError(ValueError):
    """A reward source returned something that is no reward; the message names it and shows the text.

    Attributes:
      scores: float32[B], what it returned, where that is a number a response; None where it is not.
      timed_out: it did not return in time.
    """

    scores: np.ndarray | None = None
    timed_out = False


@dataclasses.dataclass(frozen=True)
class RewardFunction:
    """A Python function as a source of rewards.

    Attributes:
      function: f(prompts: list[str], responses: list[str], **columns) → float[B], columns being the data set's others.
      weight: its score is multiplied by this before sources are summed.
      name: for messages; default: the function's own.
      timeout: seconds that a call may take; None = for ever. With one it runs in a thread of its own, which Python
        cannot end: a call that hangs stays in memory.
    """

    function: ScoreTexts
    weight: float = 1.0
    name: str | None = None
    timeout: float | None = None

    @property
    def title(self) -> str:
        """What messages call it."""
        return self.name or getattr(self.function, "__name__", type(self.function).__name__)

    def __call__(self, prompts: list[str], responses: list[str], columns: Mapping[str, Sequence[Any]]) -> np.ndarray:
        """Scores texts.

        Args:
          prompts: B texts.
          responses: B texts, without special tokens.
          columns: the data set's other columns, B entries each.

        Returns:
          float32[B], weighted.

        Raises:
          RewardError: it raised an exception, took too long, or did not return B finite numbers.
        """
        name = self.title
        try:
            returned = _in_time(lambda: self.function(prompts, responses, **columns), self.timeout, name, responses)
            scores = np.asarray(returned, dtype=np.float32)
        except RewardError:
            raise
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise RewardError(
                f"reward function {name!r} failed, or did not return numbers: {type(error).__name__}: "
                f"{printable(str(error), 400)} "
                f"({place.filename}, line {place.lineno}). It is called as {name}(prompts, responses"
                f"{''.join(f', {column}=…' for column in columns)}) and returns a float for each of {len(responses)} "
                f"responses; the first was {responses[0]!r}."
            ) from error
        if scores.shape != (len(responses),):
            raise RewardError(
                f"reward function {name!r} returned shape {list(scores.shape)} for {len(responses)} responses; one "
                f"float each is expected. The first response was {responses[0]!r}."
            )
        wrong = np.flatnonzero(~np.isfinite(scores))
        if len(wrong):
            row = int(wrong[0])
            error = RewardError(
                f"reward function {name!r} returned {scores[row]} for {len(wrong)} of {len(responses)} responses, "
                f"first for row {row}: prompt {prompts[row]!r}, response {responses[row]!r}."
            )
            error.scores = self.weight * scores
            raise error
        return self.weight * scores


def _in_time(call: Callable[[], Any], timeout: float | None, name: str, responses: Sequence[str]) -> Any:
    """What a call returns, or its exception; RewardError where it takes too long."""
    if timeout is None:
        return call()
    title = f"reward function {name}"
    if sum(thread.name == title for thread in threading.enumerate()) >= _HANGING:
        raise RewardError(f"reward function {name!r}: {_HANGING} calls of it have not ended, and no other is begun.")
    answers: queue.SimpleQueue = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((call(), None))
        except BaseException as error:  # SystemExit too: a judge may not end the run
            answers.put((None, error))

    # A daemon: Python does not wait for it at its end.
    threading.Thread(target=run, name=title, daemon=True).start()
    try:
        value, error = answers.get(timeout=timeout)
    except queue.Empty:
        late = RewardError(
            f"reward function {name!r} took more than {timeout:g} seconds for {len(responses)} responses; the "
            f"first was {responses[0]!r}."
        )
        late.timed_out = True
        raise late from None
    if isinstance(error, Exception):
        raise error
    if error is not None:
        raise RuntimeError(f"it ended with {type(error).__name__}") from error
    return value


@dataclasses.dataclass(frozen=True)
class OnFailure:
    """What becomes of a reward function's failures.

    Attributes:
      retries: how often a call is repeated.
      then: "fatal": RewardError; "penalize": its responses without a score get `score`.
      score: of those, instead of all functions' sum.
    """

    retries: int = 0
    then: Literal["fatal", "penalize"] = "fatal"
    score: float = -1.0


@dataclasses.dataclass
class Failures:
    """What went wrong so far.

    Attributes:
      failed_calls: repeated ones and time-outs among them.
      timeouts: calls that took too long.
      penalized: responses that got `OnFailure.score`.
    """

    failed_calls: int = 0
    timeouts: int = 0
    penalized: int = 0


def score_texts(
    functions: Sequence[RewardFunction],
    prompts: list[str],
    responses: list[str],
    columns: Mapping[str, Sequence[Any]],
    on_failure: OnFailure | None = None,
    failures: Failures | None = None,
) -> np.ndarray:
    """The weighted sum of several functions' scores.

    Args:
      functions: one or more.
      prompts, responses: B texts each.
      columns: the data set's other columns, B entries each.
      on_failure: what becomes of failures; None = they are fatal at once.
      failures: counts them, where given.

    Returns:
      float32[B].

    Raises:
      RewardError: a function did not return B finite numbers, and that is fatal.
    """
    if not responses:  # of several processes one may own no rows
        return np.zeros(0, np.float32)
    how, count = on_failure or OnFailure(), Failures() if failures is None else failures
    scores = [_tried(function, prompts, responses, columns, how, count) for function in functions]
    total = np.sum(scores, axis=0, dtype=np.float32)
    missing = ~np.isfinite(total)
    count.penalized += int(np.sum(missing))
    return np.where(missing, np.float32(how.score), total)


def _tried(
    function: RewardFunction,
    prompts: list[str],
    responses: list[str],
    columns: Mapping[str, Sequence[Any]],
    how: OnFailure,
    count: Failures,
) -> np.ndarray:
    """A function's scores; NaN where it has none, and that is not fatal."""
    for attempt in range(how.retries + 1):
        try:
            return function(prompts, responses, columns)
        except RewardError as error:
            count.failed_calls += 1
            count.timeouts += error.timed_out
            if attempt < how.retries:
                logging.warning("%s Attempt %d of %d.", error, attempt + 1, how.retries + 1)
                continue
            if how.then == "fatal":
                raise
            logging.warning("%s The responses without a score get %g.", error, how.score)
            return np.full(len(responses), math.nan, np.float32) if error.scores is None else error.scores
    raise AssertionError("unreachable")
