"""Reward functions over texts: user-supplied Python functions, whose results are checked."""

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
from jax_rlhf.rewards.calling import RewardInputs, arguments, asks_for_special_tokens, describe_call
from jax_rlhf.rewards.isolation import IsolatedFunction, IsolationError

ScoreTexts = Callable[..., Sequence[float] | np.ndarray]

_HANGING = 16  # calls that have not returned, after which no further call is started


class RewardError(ValueError):
    """A reward function failed, or returned something other than rewards; the message names it and shows a text.

    Attributes:
      scores, given: float32[B] and bool[B], the results as in `RewardFunction.score` if there is one per response, with
        invalid numbers among them; else None.
      timed_out: the function did not return in time.
    """

    scores: np.ndarray | None = None
    given: np.ndarray | None = None
    timed_out = False


@dataclasses.dataclass(frozen=True)
class RewardFunction:
    """A Python function as a source of rewards.

    Attributes:
      function: f(prompts: list[str], responses: list[str], **columns) → float[B], where columns are the data set's
        other columns; or with TRL's signature f(prompts=…, completions=…, completion_ids=…, **columns), see
        `calling.arguments`. None instead of a number means that the function does not apply to a response.
      weight: factor of its scores in the sum of all functions.
      name: in messages; None = the function's own name.
      timeout: the longest duration of a call in seconds; None = no limit. With a limit the call runs in a separate
        thread. Python cannot end threads, so a call that hangs stays in memory.
      isolation: "process" = it runs in a separate process, which is killed if a call takes too long, and started again
        if it ends. Then `function` must be "package.module:function", or a function that can be imported by such a
        name. "none" = it runs in this process, with the same permissions and memory.
      memory_gb: with isolation, the largest address space of its process, in GB; None = no limit.
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
            raise ValueError(
                f'function={self.function!r}: a name is for isolation="process"; otherwise pass the function itself.'
            )

    @property
    def _in_its_process(self) -> IsolatedFunction:
        return vars(self)["_isolated"]

    @property
    def title(self) -> str:
        """The function's name in messages."""
        if isinstance(self.function, str):
            return self.name or self.function.rpartition(":")[2]
        return self.name or getattr(self.function, "__name__", type(self.function).__name__)

    def asks_for_special_tokens(self) -> bool:
        """Whether it has a parameter for texts with special tokens. With isolation this starts its process.

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
          float32[B], weighted; NaN where the function returned None.

        Raises:
          RewardError: it raised an exception, took too long, or did not return B finite numbers (or Nones).
        """
        scores, given = self.score(RewardInputs(prompts, responses, columns))
        return np.where(given, scores, np.float32(math.nan))

    def score(self, inputs: RewardInputs) -> tuple[np.ndarray, np.ndarray]:
        """Scores B responses.

        Args:
          inputs: the responses.

        Returns:
          (scores, given): float32[B], weighted, 0 where the function returned None; bool[B], whether it returned a
          number.

        Raises:
          RewardError: as for `__call__`.
        """
        name, count = self.title, len(inputs)
        prompts, responses = list(inputs.prompts), list(inputs.responses)
        try:
            returned = self._called(inputs, responses)
            given = np.array([value is not None for value in returned]) if _is_list(returned) else np.ones(count, bool)
            scores = np.asarray(returned, dtype=np.float32)
        except RewardError:
            raise
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            form = name if isinstance(self.function, str) else describe_call(self.function, name, inputs.columns)
            raise RewardError(
                f"reward function {name!r} failed, or did not return numbers: {type(error).__name__}: "
                f"{printable(_text_of(error), 400)} ({frame.filename}, line {frame.lineno}). It is called as {form} "
                f"and must return a float, or None, for each of {count} responses; the first was {responses[0]!r}."
            ) from error
        if scores.shape != (count,):
            raise RewardError(
                f"reward function {name!r} returned shape {list(scores.shape)} for {count} responses; it must return "
                f"one float per response. The first response was {responses[0]!r}."
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

    def _called(self, inputs: RewardInputs, responses: list[str]) -> Any:
        """Calls the function, in this process or in its own."""
        if self.isolation == "process":
            try:
                return self._in_its_process(inputs, self.timeout)
            except IsolationError as error:
                raise self._failure(error, f" for {len(inputs)} responses; the first was {responses[0]!r}") from error
        function = self.function
        assert not isinstance(function, str)
        positional, keywords = arguments(function, inputs)
        call = lambda: _awaited(function(*positional, **keywords))  # noqa: E731
        return _in_time(call, self.timeout, self.title, responses)

    def _failure(self, error: IsolationError, on: str) -> RewardError:
        failure = RewardError(
            f"reward function {self.title!r}, in its own process, failed{on}: {printable(str(error), 600)}."
        )
        failure.timed_out = error.timed_out
        return failure


def asks_for_special_tokens_of(functions: Sequence[RewardFunction]) -> bool:
    """Whether any of the functions, which are about to be called, has a parameter for texts with special tokens.

    A function whose process cannot be started counts as having none: its call will fail, and be counted as a failure.
    """
    asks = False
    for function in functions:
        try:
            asks = function.asks_for_special_tokens() or asks
        except RewardError as error:
            logging.warning("%s", error)
    return asks


def import_name(function: Callable | str) -> str:
    """The name by which another process can import a function.

    Args:
      function: the function, or its name.

    Returns:
      "package.module:function".

    Raises:
      ValueError: it is a lambda, a method of an object, or defined in the main program.
    """
    if isinstance(function, str):
        return function
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    found: Any = sys.modules.get(module or "")
    for part in name.split("."):
        found = getattr(found, part, None)
    if not name or found is not function or module == "__main__":
        raise ValueError(
            f"{function!r} cannot be imported by another process, which isolation needs: put it into a separate "
            'module, and pass it, or its name "package.module:function".'
        )
    return f"{module}:{name}"


def _text_of(error: Exception) -> str:
    try:
        return str(error)
    except Exception:  # `__str__` of a user's class may fail
        return "(no message)"


def _is_list(returned: Any) -> bool:
    """Whether a result may contain None; an array of numbers cannot."""
    return isinstance(returned, list | tuple) or (isinstance(returned, np.ndarray) and returned.dtype == object)


def _awaited(returned: Any) -> Any:
    """The result of an async function; TRL supports these too. Other results are returned unchanged."""
    if not inspect.isawaitable(returned):
        return returned
    with ThreadPoolExecutor(1) as thread:  # the current thread may already run an event loop, as in a notebook
        return thread.submit(asyncio.run, _wait_for(returned)).result()


async def _wait_for(returned: Any) -> Any:
    return await returned


def _in_time(call: Callable[[], Any], timeout: float | None, name: str, responses: Sequence[str]) -> Any:
    """Returns the result of a call, or raises its exception; RewardError if it takes too long."""
    if timeout is None:
        try:
            return call()
        except (Exception, KeyboardInterrupt):
            raise
        except BaseException as error:  # SystemExit, asyncio.CancelledError, a panic: the function must not end the run
            raise RuntimeError(f"it ended with {type(error).__name__}") from error
    title = f"reward function {name}"
    if sum(thread.name == title for thread in threading.enumerate()) >= _HANGING:
        raise RewardError(
            f"reward function {name!r}: {_HANGING} calls have not returned, so no further call is started."
        )
    results: queue.SimpleQueue = queue.SimpleQueue()

    def run() -> None:
        try:
            results.put((call(), None))
        except BaseException as error:  # also SystemExit: the function must not end the run
            results.put((None, error))

    # A daemon thread, because Python does not wait for it at exit.
    threading.Thread(target=run, name=title, daemon=True).start()
    try:
        value, error = results.get(timeout=timeout)
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
    """What happens if a reward function fails.

    Attributes:
      retries: how often a failed call is repeated.
      then: after the last attempt: "fatal" raises RewardError; "penalize" gives `score` to responses without a score.
      score: replaces the sum of all functions' scores for these responses.
    """

    retries: int = 0
    then: Literal["fatal", "penalize"] = "fatal"
    score: float = -1.0


@dataclasses.dataclass
class Failures:
    """Counts of failures.

    Attributes:
      failed_calls: failed calls, including retries and time-outs.
      timeouts: calls that took too long.
      penalized: responses that got `OnFailure.score`.
      calls: all calls, successful or not.
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
      on_failure: what happens if a function fails; None = the first failure is fatal.
      failures: counts failures, and is updated in place; None = they are not counted.
      completion_ids: the token ids of each response; None = not available.
      chats, continued: of each prompt, as in `Prompts`.
      with_special_tokens: (prompts, responses) decoded with special tokens, for functions that ask for them.
      unscored: the score of a response for which all functions return None; None = this is a failure.

    Returns:
      float32[B].

    Raises:
      RewardError: a function fails, or no function scores a response, and this is fatal.
    """
    if not responses:  # one of several processes may own no rows
        return np.zeros(0, np.float32)
    on_failure, failures = on_failure or OnFailure(), Failures() if failures is None else failures
    inputs = RewardInputs(prompts, responses, columns, completion_ids, chats, continued, with_special_tokens)
    scored = [_score_with_retries(function, inputs, on_failure, failures) for function in functions]
    total = np.sum([scores for scores, _ in scored], axis=0, dtype=np.float32)  # [B]
    nobody = ~np.any([given for _, given in scored], axis=0)  # [B], no function returned a number
    if unscored is None and nobody.any():
        row, names = int(np.flatnonzero(nobody)[0]), ", ".join(function.title for function in functions)
        message = (
            f"{names} returned None for {int(nobody.sum())} of {len(inputs)} responses, which therefore have no "
            f"score; first for row {row}: prompt {prompts[row]!r}, response {responses[row]!r}."
        )
        if on_failure.then == "fatal":
            raise RewardError(message)
        logging.warning("%s They get %g.", message, on_failure.score)
        total = np.where(nobody, np.float32(math.nan), total)
    missing = ~np.isfinite(total)
    failures.penalized += int(np.sum(missing))
    total = np.where(missing, np.float32(on_failure.score), total)
    return total if unscored is None else np.where(nobody, np.float32(unscored), total)


def _score_with_retries(
    function: RewardFunction, inputs: RewardInputs, on_failure: OnFailure, failures: Failures
) -> tuple[np.ndarray, np.ndarray]:
    """The result of `function.score`; after a failure that is not fatal, NaN for responses without a valid score."""
    for attempt in range(on_failure.retries + 1):
        try:
            return function.score(inputs)
        except RewardError as error:
            failures.failed_calls += 1
            failures.timeouts += error.timed_out
            if attempt < on_failure.retries:
                logging.warning("%s Attempt %d of %d.", error, attempt + 1, on_failure.retries + 1)
                continue
            if on_failure.then == "fatal":
                raise
            logging.warning("%s The responses without a score get %g.", error, on_failure.score)
            if error.scores is None or error.given is None:
                return np.full(len(inputs), math.nan, np.float32), np.ones(len(inputs), bool)
            return error.scores, error.given
        finally:
            failures.calls += 1
    raise AssertionError("unreachable")
