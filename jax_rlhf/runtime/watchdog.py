"""A run that stands still is noticed, by nothing being done for many times as long as a step takes."""

import collections
import contextlib
import faulthandler
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, TextIO, cast

from absl import logging

from jax_rlhf.runtime import guard
from jax_rlhf.runtime.config import WatchdogConfig

_STACKS = "stacks.txt"
_STEPS = 50  # whose median counts
_LOOKS = 20  # per limit
_LONGEST_PAUSE = 10.0  # seconds between two looks
_MARGIN = 60.0  # seconds that the thread has before another process ends this one, twice
_GOODBYE = 5.0  # seconds in which that process ends
_A_CALL = 1.25  # the limit is at least so many times what a call may take
STALLED = 75
"""The exit code: the same command goes on from the last checkpoint."""


class Watchdog:
    """A thread that looks whether a phase goes on; a context manager."""

    def __init__(
        self,
        config: WatchdogConfig,
        folder: Path,
        signs: Sequence[Callable[[], Any]],
        say: Callable[[str], None],
        *,
        longest_call: float | None = None,
    ) -> None:
        """Watches nothing yet.

        Args:
          config: when, and what then.
          folder: of the phase, where stacks are written.
          signs: each gives something that changes as the phase goes on, such as a count.
          say: shows a line.
          longest_call: seconds that a call of other people's code may take, which gives no sign; None = no limit.
        """
        self._config, self._folder, self._signs, self._say = config, folder, list(signs), say
        self._least = max(60 * config.minutes, _A_CALL * (longest_call or 0.0))
        self._seconds: collections.deque[float] = collections.deque(maxlen=_STEPS)
        self._stepped = self._moved = time.monotonic()
        self._seen: Any = None
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self._guard: subprocess.Popen | None = None

    def __enter__(self) -> "Watchdog":
        """Begins, once more where it has ended before."""
        self._stepped = self._moved = time.monotonic()
        self._end.clear()
        if self._config.action == "exit":
            self._guard = _started_guard()
        if self._config.action != "off":
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends."""
        self._end.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def step(self) -> None:
        """A step is done."""
        now = time.monotonic()
        self._seconds.append(now - self._stepped)
        self._stepped = self._moved = now

    @property
    def limit(self) -> float:
        """Seconds without a sign after which the phase stands still."""
        median = statistics.median(list(self._seconds)) if self._seconds else 0.0
        return max(self._least, self._config.factor * median)

    def _watch(self) -> None:
        try:
            while True:
                self._look()
                if self._guard is not None:
                    _beat(self._guard, self.limit + _MARGIN)
                pause, began = min(self.limit / _LOOKS, _LONGEST_PAUSE), time.monotonic()
                if self._end.wait(pause):
                    return
                # What it took longer, this process was stopped (Ctrl-Z, a suspended job), and could do nothing.
                self._moved += max(0.0, time.monotonic() - began - pause)
        finally:  # should a sign fail, no line would go to the guard any more
            if self._guard is not None:
                _end(self._guard)
                self._guard = None

    def _look(self) -> None:
        seen = [sign() for sign in self._signs]
        silent = time.monotonic() - self._moved
        if silent > self.limit / 2:  # a checkpoint, or a model, may be being written
            seen.append(_bytes_in(self._folder))
        else:
            seen.append(None)
        before, self._seen = self._seen, seen
        # A size that was not asked for before is not known to have changed.
        pairs = zip(before or seen, seen, strict=True)
        if any(one != other and one is not None for one, other in pairs):
            self._moved = time.monotonic()
        elif silent > self.limit:
            self._stands_still(silent)

    def _stands_still(self, silent: float) -> None:
        file = self._folder / _STACKS
        with contextlib.suppress(OSError), file.open("a") as stream:
            print(f"{time.strftime('%F %T')}: nothing was done for {silent:.0f} seconds", file=stream, flush=True)
            faulthandler.dump_traceback(stream, all_threads=True)
        text = f"nothing was done for {silent:.0f} seconds; what each thread is in stands in {file}"
        if self._config.action == "warn":
            self._say(text)
            self._moved = time.monotonic()
            return
        # Not through the progress bar or logging, whose locks a thread that stands still may hold.
        with contextlib.suppress(OSError):
            os.write(2, f"\n{text}. The same command goes on from the last checkpoint.\n".encode())
        os._exit(STALLED)


def _started_guard() -> subprocess.Popen | None:
    """Ends this process where its watchdog cannot run either, as C code holds Python's lock for ever."""
    with contextlib.suppress(ValueError, AttributeError, OSError, RuntimeError):  # of a stderr that is no file
        if not faulthandler.is_enabled():
            faulthandler.enable(file=cast(TextIO, sys.__stderr__))
    try:
        command = [sys.executable, "-I", "-S", guard.__file__, str(_MARGIN)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    except OSError as error:  # no more processes: the thread alone watches
        logging.warning("the watchdog has no process beside it: %s", error)
        return None
    os.set_blocking(_stdin(process).fileno(), False)
    return process


def _stdin(process: subprocess.Popen) -> IO[bytes]:
    assert process.stdin is not None  # started with a pipe
    return process.stdin


def _beat(process: subprocess.Popen, seconds: float) -> None:
    """Within so many seconds comes the next line."""
    with contextlib.suppress(OSError):  # it has ended, or is stopped and its pipe full
        os.write(_stdin(process).fileno(), b"%.3f\n" % seconds)


def _end(process: subprocess.Popen) -> None:
    _stdin(process).close()
    try:
        process.wait(_GOODBYE)
    except subprocess.TimeoutExpired:  # somebody has stopped it
        process.kill()
        process.wait()


def _bytes_in(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total
