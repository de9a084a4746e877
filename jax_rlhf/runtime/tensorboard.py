"""Curves for TensorBoard.

Events are written in the calling thread. tensorboardX's SummaryWriter uses another thread, which dies when the disk is
full, and the run then waits for it forever.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.summary import scalar

from jax_rlhf.io.durable import file_errors

_EVENTS: Any = event_pb2  # its classes are created at run time, so type checkers do not know them
_SECONDS = 10.0  # between flushes, each of which waits for the disk


class TensorBoard:
    """Writes an event file; each start of a phase has its own.

    Args:
      folder: the folder of the event files.
      first: the first step of this start. TensorBoard hides points of earlier starts from this step on.

    Raises:
      OSError: the file cannot be written. The methods raise it too.
    """

    def __init__(self, folder: Path, first: int) -> None:
        self._folder, self._flushed = folder, 0.0
        folder.mkdir(parents=True, exist_ok=True)
        with file_errors(folder):
            self._writer = EventsWriter(str(folder / "events"))
            self._write(_EVENTS.Event(session_log=_EVENTS.SessionLog(status=_EVENTS.SessionLog.START)), first)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a point to each curve, given as name → value."""
        with file_errors(self._folder):
            for name, value in values.items():
                self._write(_EVENTS.Event(summary=scalar(name, value)), step)
            if time.monotonic() - self._flushed > _SECONDS:
                self._writer.flush()
                self._flushed = time.monotonic()

    def close(self) -> None:
        """Flushes and closes the file."""
        with file_errors(self._folder):
            self._writer.close()

    def _write(self, event: Any, step: int) -> None:
        event.wall_time, event.step = time.time(), step
        self._writer.write_event(event)
