"""Reward functions over texts: other people's Python, with what it returns checked."""

import asyncio
import dataclasses
import inspect
import math
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
from absl import logging

from jax_rlhf.io.printable import printable
from jax_rlhf.rewards.calling import Answers, arguments, asks_for_special_tokens, call_in_words
from jax_rlhf.rewards.isolation import IsolatedFunction, IsolationError

ScoreTexts = Callable[..., Sequence[float] | np.ndarray]

_HANGING = 16  # calls that never ended, after which it is no use to begin another


class RewardError(ValueError):
    """A reward source returned something that is no reward; the message names it and shows the text.

    Attributes:
      scores, given: float32[B] and bool[B], what it returned, where that is a number per response; else None.
      timed_out: it did not return in time.
    """

    scores: np.ndarray | None = None
    given: np.ndarray | None = None
    timed_out = False


@dataclasses.dataclass(frozen=True)
class RewardFunction:
    """A Python function as a source of rewards.

    Attributes:
      function: f(prompts: list[str], responses: list[str], **columns) → float[B], columns being the data set's others;
        or TRL's f(prompts=…, completions=…, completion_ids=…, **columns): see `calling.arguments`. None instead of a
        number says that a response is not this function's.
      weight: its score is multiplied by this before sources are summed.
      name: for messages; default: the function's own.
      timeout: seconds that a call may take; None = for ever. With one it runs in a thread of its own, which Python
        cannot end: a call that hangs stays in memory.
      isolation: "process": it runs in a process of its own, which is killed where it takes too long, and started again
        where it ends. `function` is "package.module:function" then, or a function that can be imported so. "none": it
        runs in this process, with its rights and its memory.
      memory_gb: with isolation, address space that a process of it may take, in GB; None = no limit.
    """

    function: ScoreTexts | str
    weight: float = 1.0
    name: str | None = None
    timeout: float | None = None
    isolation: Literal["none", "process"] = "none"
    memory_gb: float | None = None

    def __post_init__(self) -> None:
        if self.isolation == "process":
            isolated = IsolatedFunction(import_name(self.function), memory_gb=self.memory_gb)
            object.__setattr__(self, "_isolated", isolated)
        elif isinstance(self.function, str):
            raise ValueError(f'function={self.function!r}: a name is for isolation="process"; else give the function.')

    @property
    def _in_its_process(self) -> IsolatedFunction:
        return vars(self)["_isolated"]

    @property
    def title(self) -> str:
        """What messages call it."""
        if isinstance(self.function, str):
            return self.name or self.function.rpartition(":")[2]
        return self.name or getattr(self.function, "__name__", type(self.function).__name__)

    def asks_for_special_tokens(self) -> bool:
        """Whether it has a parameter for texts with special tokens. With isolation its process is started.

        Returns:
          Whether.

        Raises:
          RewardError: its process cannot import it.
        """
        if self.isolation == "none":
            assert not isinstance(self.function, str)
            return asks_for_special_tokens(self.function)
        try:
            return self._in_its_process.asks_for_special_tokens(self.timeout)
        except IsolationError as error:
            raise self._failure(error, "") from error

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> np.ndarray:
        """Scores texts.

        Args:
          prompts: B texts.
          responses: B texts, without special tokens.
          columns: the data set's other columns, B entries each.

        Returns:
          float32[B], weighted; NaN where the function gave None.

        Raises:
          RewardError: it raised an exception, took too long, or did not return B finite numbers (or Nones).
        """
        scores, given = self.score(Answers(prompts, responses, columns))
        return np.where(given, scores, np.float32(math.nan))

    def score(self, answers: Answers) -> tuple[np.ndarray, np.ndarray]:
        """Scores answers.

        Args:
          answers: B of them.

        Returns:
          (scores, given): float32[B], weighted, 0 where the function gave None; bool[B], whether it gave a number.

        Raises:
          RewardError: as above.
        """
        name, count = self.title, len(answers)
        prompts, responses = list(answers.prompts), list(answers.responses)
        try:
            returned = self._called(answers, responses)
            given = np.array([value is not None for value in returned]) if _is_list(returned) else np.ones(count, bool)
            scores = np.asarray(returned, dtype=np.float32)
        except RewardError:
            raise
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            form = name if isinstance(self.function, str) else call_in_words(self.function, name, answers.columns)
            raise RewardError(
                f"reward function {name!r} failed, or did not return numbers: {type(error).__name__}: "
                f"{printable(_text_of(error), 400)} ({place.filename}, line {place.lineno}). It is called as {form} "
                f"and returns a float, or None, for each of {count} responses; the first was {responses[0]!r}."
            ) from error
        if scores.shape != (count,):
            raise RewardError(
                f"reward function {name!r} returned shape {list(scores.shape)} for {count} responses; one float each "
                f"is expected. The first response was {responses[0]!r}."
            )
        wrong = np.flatnonzero(given & ~np.isfinite(scores))
        scores = np.where(given, np.float32(self.weight) * scores, np.float32(0))
        if len(wrong):
            row = int(wrong[0])
            error = RewardError(
                f"reward function {name!r} returned {returned[row]} for {len(wrong)} of {count} responses, "
                f"first for row {row}: prompt {prompts[row]!r}, response {responses[row]!r}."
            )
            error.scores, error.given = scores, given
            raise error
        return scores, given

    def _called(self, answers: Answers, responses: list[str]) -> Any:
        """What the function returns, wherever it runs."""
        if self.isolation == "process":
            try:
                return self._in_its_process(answers, self.timeout)
            except IsolationError as error:
                raise self._failure(error, f" for {len(answers)} responses; the first was {responses[0]!r}") from error
        function = self.function
        assert not isinstance(function, str)
        positional, keywords = arguments(function, answers)
        call = lambda: _awaited(function(*positional, **keywords))  # noqa: E731
        return _in_time(call, self.timeout, self.title, responses)

    def _failure(self, error: IsolationError, of: str) -> RewardError:
        failure = RewardError(
            f"reward function {self.title!r}, in its own process, failed{of}: {printable(str(error), 600)}."
        )
        failure.timed_out = error.timed_out
        return failure


def asks_for_special_tokens_of(functions: Sequence[RewardFunction]) -> bool:
    """Whether any of them asks for texts with special tokens, as they are about to be called.

    Args:
      functions: any number.

    Returns:
      Whether. One whose process cannot be started does not ask: its call fails, and is counted, as others that fail.
    """
    asks = False
    for function in functions:
        try:
            asks = function.asks_for_special_tokens() or asks
        except RewardError as error:
            logging.warning("%s", error)
    return asks


def import_name(function: Callable | str) -> str:
    """By what name another process can import a function.

    Args:
      function: one, or its name.

    Returns:
      "package.module:function".

    Raises:
      ValueError: it is a lambda, a method of an object, or of the program that was started.
    """
    if isinstance(function, str):
        return function
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    found: Any = sys.modules.get(module or "")
    for part in name.split("."):
        found = getattr(found, part, None)
    if not name or found is not function or module == "__main__":
        raise ValueError(
            f"{function!r} cannot be imported by another process, as isolation needs: put it into a module of its own, "
            'and give it, or its name "package.module:function".'
        )
    return f"{module}:{name}"


def _text_of(error: Exception) -> str:
    try:
        return str(error)
    except Exception:  # it is somebody else's class
        return "(without words)"


def _is_list(returned: Any) -> bool:
    """Whether it may hold Nones; an array of numbers cannot."""
    return isinstance(returned, list | tuple) or (isinstance(returned, np.ndarray) and returned.dtype == object)


def _awaited(returned: Any) -> Any:
    """What an async function, as TRL takes them too, ends with."""
    if not inspect.isawaitable(returned):
        return returned
    with ThreadPoolExecutor(1) as thread:  # this one may have a loop that runs, as in a notebook
        return thread.submit(asyncio.run, _wait_for(returned)).result()


async def _wait_for(returned: Any) -> Any:
    return await returned


def _in_time(call: Callable[[], Any], timeout: float | None, name: str, responses: Sequence[str]) -> Any:
    """What a call returns, or its exception; RewardError where it takes too long."""
    if timeout is None:
        try:
            return call()
        except (Exception, KeyboardInterrupt):
            raise
        except BaseException as error:  # SystemExit, asyncio's, a library's panic: a judge may not end the run
            raise RuntimeError(f"it ended with {type(error).__name__}") from error
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
      calls: that have ended, well or not.
    """

    failed_calls: int = 0
    timeouts: int = 0
    penalized: int = 0
    calls: int = dataclasses.field(default=0, compare=False)


def score_texts(
    functions: Sequence[RewardFunction],
    prompts: Sequence[str],
    responses: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    on_failure: OnFailure | None = None,
    failures: Failures | None = None,
    *,
    completion_ids: Sequence[Sequence[int]] | None = None,
    chats: Sequence[list[dict[str, Any]] | None] | None = None,
    continued: Sequence[bool] | None = None,
    with_special_tokens: tuple[Sequence[str], Sequence[str]] | None = None,
    unscored: float | None = None,
) -> np.ndarray:
    """The weighted sum of several functions' scores.

    Args:
      functions: one or more.
      prompts, responses: B texts each.
      columns: the data set's other columns, B entries each.
      on_failure: what becomes of failures; None = they are fatal at once.
      failures: counts them, where given.
      completion_ids: the ids of each response; None = not known.
      chats, continued: of each prompt, as `Prompts` has them.
      with_special_tokens: prompts and responses once more, special tokens among them, for functions that ask for them.
      unscored: of a response for which all functions gave None; None = that is a failure.

    Returns:
      float32[B].

    Raises:
      RewardError: a function did not return B finite numbers, or none scored a response, and that is fatal.
    """
    if not responses:  # of several processes one may own no rows
        return np.zeros(0, np.float32)
    how, count = on_failure or OnFailure(), Failures() if failures is None else failures
    answers = Answers(prompts, responses, columns, completion_ids, chats, continued, with_special_tokens)
    scored = [_tried(function, answers, how, count) for function in functions]
    total = np.sum([scores for scores, _ in scored], axis=0, dtype=np.float32)
    nobody = ~np.any([given for _, given in scored], axis=0)
    if unscored is None and nobody.any():
        row, names = int(np.flatnonzero(nobody)[0]), ", ".join(function.title for function in functions)
        message = (
            f"{names} gave None for {int(nobody.sum())} of {len(answers)} responses, which have no score then; first "
            f"for row {row}: prompt {prompts[row]!r}, response {responses[row]!r}."
        )
        if how.then == "fatal":
            raise RewardError(message)
        logging.warning("%s They get %g.", message, how.score)
        total = np.where(nobody, np.float32(math.nan), total)
    missing = ~np.isfinite(total)
    count.penalized += int(np.sum(missing))
    total = np.where(missing, np.float32(how.score), total)
    return total if unscored is None else np.where(nobody, np.float32(unscored), total)


def _tried(
    function: RewardFunction, answers: Answers, how: OnFailure, count: Failures
) -> tuple[np.ndarray, np.ndarray]:
    """A function's scores, and which it gave; NaN where it has none, and that is not fatal."""
    for attempt in range(how.retries + 1):
        try:
            return function.score(answers)
        except RewardError as error:
            count.failed_calls += 1
            count.timeouts += error.timed_out
            if attempt < how.retries:
                logging.warning("%s Attempt %d of %d.", error, attempt + 1, how.retries + 1)
                continue
            if how.then == "fatal":
                raise
            logging.warning("%s The responses without a score get %g.", error, how.score)
            if error.scores is None or error.given is None:
                return np.full(len(answers), math.nan, np.float32), np.ones(len(answers), bool)
            return error.scores, error.given
        finally:
            count.calls += 1
    raise AssertionError("unreachable")
