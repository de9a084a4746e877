"""Preemption: signals and maintenance notices ask a run to stop; it finishes the current step, and saves its state."""

import contextlib
import os
import signal
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


class Stopped(Exception):
    """The run was asked to stop. All processes raise this at the same step, and the state is saved."""

    on_all_processes = True


class StopSignals:
    """Signal handlers that ask the run to stop.

    They set `reason` after Ctrl-C, SIGTERM and SIGHUP (a closed terminal). The program calls `on_any_process` where it
    can stop. A second signal ends it at once, except SIGHUP. With several processes JAX's preemption service handles
    SIGTERM, and on TPUs maintenance notices, and chooses a step that all processes reach.

    Attributes:
      reason: "Ctrl-C", "SIGTERM", "SIGHUP" or "preemption"; None = this process was not asked to stop.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._former: dict[int, Any] = {}
        self._asked = 0

    def install(self) -> "StopSignals":
        """Installs the handlers, if called in the main thread, and returns itself."""
        service = jax.process_count() > 1 and jax.distributed.is_initialized()
        for number in (signal.SIGINT, signal.SIGHUP) if service else (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # under nohup the run outlives its terminal
            with contextlib.suppress(ValueError):  # not in the main thread, which then handles signals
                self._former[number] = signal.signal(number, self._handle)
        return self

    def uninstall(self) -> None:
        """Restores the former handlers."""
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.reason = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        hung_up = number == signal.SIGHUP  # some terminals send it twice when they are closed
        # After this, a second signal ends the process at once, whatever the main thread does.
        signal.signal(number, signal.SIG_IGN if hung_up else signal.SIG_DFL)
        second = "" if hung_up else "; a second signal stops it at once"
        with contextlib.suppress(OSError):  # not print, since the signal may have interrupted a print
            os.write(2, f"\n{self.reason}: the run stops after this step is finished and saved{second}.\n".encode())

    def on_any_process(self, *others: bool) -> tuple[bool, ...]:
        """Whether any process was asked to stop. All processes must call this equally often.

        Args:
          others: further flags of this process.

        Returns:
          Whether to stop, then for each further flag whether it is set in any process.
        """
        self._asked += 1
        flags = (self.reason is not None, *others)
        if jax.process_count() == 1:
            return flags
        preempted = multihost_utils.reached_preemption_sync_point(self._asked)
        if preempted:
            self.reason = "preemption"  # the same in all processes
        gathered = multihost_utils.process_allgather(np.asarray((flags[0] or preempted, *others)))
        return tuple(map(bool, np.any(gathered.reshape(jax.process_count(), -1), axis=0)))

    def check(self) -> None:
        """Raises if the run was asked to stop; called where it can stop.

        Raises:
          Stopped: any process was asked to stop.
        """
        if self.on_any_process()[0]:
            raise Stopped(self.reason or "another process was asked to stop")
