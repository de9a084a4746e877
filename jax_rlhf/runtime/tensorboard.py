"""Curves for TensorBoard.

They are written at once. tensorboardX's SummaryWriter leaves that to a thread, which ends where the disk is full; the
run then waits for it for ever.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.summary import scalar

from jax_rlhf.io.durable import file_errors

_EVENTS: Any = event_pb2  # its classes are made at run time, so that type checkers do not see them
_SECONDS = 10.0  # between flushes, each of which waits for the disk


class TensorBoard:
    """A file of events, one per start of a phase.

    Args:
      folder: for the files of all starts.
      first: step from which on those of former starts do not count.

    Raises:
      OSError: a file cannot be written; so do the methods.
    """

    def __init__(self, folder: Path, first: int) -> None:
        self._folder, self._flushed = folder, 0.0
        folder.mkdir(parents=True, exist_ok=True)
        with file_errors(folder):
            self._writer = EventsWriter(str(folder / "events"))
            self._write(_EVENTS.Event(session_log=_EVENTS.SessionLog(status=_EVENTS.SessionLog.START)), first)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a point to each curve.

        Args:
          step: steps done.
          values: name → number.
        """
        with file_errors(self._folder):
            for name, value in values.items():
                self._write(_EVENTS.Event(summary=scalar(name, value)), step)
            if time.monotonic() - self._flushed > _SECONDS:
                self._writer.flush()
                self._flushed = time.monotonic()

    def close(self) -> None:
        """Writes what is left."""
        with file_errors(self._folder):
            self._writer.close()

    def _write(self, event: Any, step: int) -> None:
        event.wall_time, event.step = time.time(), step
        self._writer.write_event(event)
