"""The watchdog: detects a stalled run, which makes no progress for many times the duration of a step."""

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
_STEPS = 50  # the median is that of so many last steps
_CHECKS = 20  # checks within the time limit
_LONGEST_PAUSE = 10.0  # seconds between two checks
_MARGIN = 60.0  # seconds of grace before the guard kills this process; it is given twice
_GOODBYE = 5.0  # seconds to wait for the guard to exit
_CALL_FACTOR = 1.25  # the limit is at least this times the longest allowed call
STALLED = 75
"""The exit code of a stalled run; the same command continues from the last checkpoint."""


class Watchdog:
    """A thread that checks whether a phase makes progress; a context manager, which can be entered several times."""

    def __init__(
        self,
        config: WatchdogConfig,
        folder: Path,
        activity: Sequence[Callable[[], Any]],
        print_line: Callable[[str], None],
        *,
        longest_call: float | None = None,
    ) -> None:
        """Creates a watchdog, which does not run yet.

        Args:
          config: the time limit, and what happens when it is exceeded.
          folder: the phase's folder; the stacks of all threads are written there.
          activity: functions whose values, such as counts, change while the phase makes progress.
          print_line: prints a line.
          longest_call: seconds that a call of a reward function may take, while no value changes; None = no limit.
        """
        self._config, self._folder, self._activity, self._print_line = config, folder, list(activity), print_line
        self._shortest = max(60 * config.minutes, _CALL_FACTOR * (longest_call or 0.0))
        self._seconds: collections.deque[float] = collections.deque(maxlen=_STEPS)
        self._stepped = self._moved = time.monotonic()
        self._seen: Any = None
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self._guard: subprocess.Popen | None = None

    def __enter__(self) -> "Watchdog":
        """Starts the thread, and with action="exit" the guard process."""
        self._stepped = self._moved = time.monotonic()
        self._end.clear()
        if self._config.action == "exit":
            self._guard = _start_guard()
        if self._config.action != "off":
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the thread, which ends the guard."""
        self._end.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def step(self) -> None:
        """Notes that a step is done."""
        now = time.monotonic()
        self._seconds.append(now - self._stepped)
        self._stepped = self._moved = now

    @property
    def limit(self) -> float:
        """Seconds without progress after which the phase has stalled."""
        median = statistics.median(list(self._seconds)) if self._seconds else 0.0
        return max(self._shortest, self._config.factor * median)

    def _watch(self) -> None:
        try:
            while True:
                self._check()
                if self._guard is not None:
                    _send_heartbeat(self._guard, self.limit + _MARGIN)
                pause, started = min(self.limit / _CHECKS, _LONGEST_PAUSE), time.monotonic()
                if self._end.wait(pause):
                    return
                # If the wait took longer, this process was suspended (Ctrl-Z, a scheduler); that time does not count.
                self._moved += max(0.0, time.monotonic() - started - pause)
        finally:  # also if a function of `activity` raises: without heartbeats the guard would kill the process
            if self._guard is not None:
                _end(self._guard)
                self._guard = None

    def _check(self) -> None:
        seen = [value() for value in self._activity]
        silent = time.monotonic() - self._moved
        if silent > self.limit / 2:  # perhaps a checkpoint or a model is being written
            seen.append(_folder_bytes(self._folder))
        else:
            seen.append(None)
        before, self._seen = self._seen, seen
        # None = the size of the folder was not measured, so there is nothing to compare.
        pairs = zip(before or seen, seen, strict=True)
        if any(old != new and old is not None for old, new in pairs):
            self._moved = time.monotonic()
        elif silent > self.limit:
            self._stalled(silent)

    def _stalled(self, silent: float) -> None:
        file = self._folder / _STACKS
        with contextlib.suppress(OSError), file.open("a") as stream:
            print(f"{time.strftime('%F %T')}: no progress for {silent:.0f} seconds", file=stream, flush=True)
            faulthandler.dump_traceback(stream, all_threads=True)
        text = f"no progress for {silent:.0f} seconds; the stacks of all threads are in {file}"
        if self._config.action == "warn":
            self._print_line(text)
            self._moved = time.monotonic()
            return
        # Not through the progress bar or logging, whose locks a stalled thread may hold.
        with contextlib.suppress(OSError):
            os.write(2, f"\n{text}. Run the same command again to continue from the last checkpoint.\n".encode())
        os._exit(STALLED)


def _start_guard() -> subprocess.Popen | None:
    """Starts the guard, which kills this process if not even the watchdog thread runs, since C code holds the GIL."""
    with contextlib.suppress(ValueError, AttributeError, OSError, RuntimeError):  # if stderr is not a file
        if not faulthandler.is_enabled():
            faulthandler.enable(file=cast(TextIO, sys.__stderr__))
    try:
        command = [sys.executable, "-I", "-S", guard.__file__, str(_MARGIN)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    except OSError as error:  # no more processes: only the thread watches
        logging.warning("the watchdog runs without its guard process: %s", error)
        return None
    os.set_blocking(_stdin(process).fileno(), False)
    return process


def _stdin(process: subprocess.Popen) -> IO[bytes]:
    assert process.stdin is not None  # it was started with a pipe
    return process.stdin


def _send_heartbeat(process: subprocess.Popen, seconds: float) -> None:
    """Tells the guard that the next heartbeat will come within so many seconds."""
    with contextlib.suppress(OSError):  # it has exited, or is suspended and its pipe is full
        os.write(_stdin(process).fileno(), b"%.3f\n" % seconds)


def _end(process: subprocess.Popen) -> None:
    _stdin(process).close()
    try:
        process.wait(_GOODBYE)
    except subprocess.TimeoutExpired:  # it is suspended
        process.kill()
        process.wait()


def _folder_bytes(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total
