"""Being asked to stop, by signals or a maintenance notice: the step at hand is finished, its state saved."""

import contextlib
import os
import signal
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


class Stopped(Exception):
    """The run stops since it was asked to, in all processes alike; what was trained is saved."""

    on_all_processes = True


class StopSignals:
    """Hears that the run is asked to stop.

    Ctrl-C, SIGTERM and SIGHUP (a closed terminal) are noted. The program calls `on_any_process` where it can stop. A
    second signal ends it at once, except SIGHUP. Of several processes JAX's preemption service has SIGTERM, on TPUs
    maintenance notices too, and names a point that all reach.

    Attributes:
      reason: "Ctrl-C", "SIGTERM", "SIGHUP" or "preemption"; None = this process was not asked to stop.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._former: dict[int, Any] = {}
        self._asked = 0

    def install(self) -> "StopSignals":
        """Installs the handlers, in the main thread.

        Returns:
          Itself.
        """
        served = jax.process_count() > 1 and jax.distributed.is_initialized()
        for number in (signal.SIGINT, signal.SIGHUP) if served else (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # under nohup the run outlives its terminal
            with contextlib.suppress(ValueError):  # not in the main thread: signals are somebody else's
                self._former[number] = signal.signal(number, self._note)
        return self

    def uninstall(self) -> None:
        """Puts the former handlers back."""
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.reason = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        hung_up = number == signal.SIGHUP  # the terminal is closed, and some send it twice
        # Once more: at once, whatever the main thread is in.
        signal.signal(number, signal.SIG_IGN if hung_up else signal.SIG_DFL)
        once_more = "" if hung_up else "; once more stops at once"
        with contextlib.suppress(OSError):  # not print: what it interrupts may be printing
            os.write(2, f"\n{self.reason}: this step is finished and saved{once_more}.\n".encode())

    def on_any_process(self, *others: bool) -> tuple[bool, ...]:
        """Whether any process was asked to stop; all must call it, equally often.

        Args:
          others: what else any process may want.

        Returns:
          Whether to stop, and whether any process wants each of the others.
        """
        self._asked += 1
        flags = (self.reason is not None, *others)
        if jax.process_count() == 1:
            return flags
        preempted = multihost_utils.reached_preemption_sync_point(self._asked)
        if preempted:
            self.reason = "preemption"  # in all processes alike
        gathered = multihost_utils.process_allgather(np.asarray((flags[0] or preempted, *others)))
        return tuple(map(bool, np.any(gathered.reshape(jax.process_count(), -1), axis=0)))

    def check(self) -> None:
        """A point where the run can stop.

        Raises:
          Stopped: any process was asked to.
        """
        if self.on_any_process()[0]:
            raise Stopped(self.reason or "another process was asked to stop")
