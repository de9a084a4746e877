"""What other packages write to the terminal: log records, warnings and tracebacks, with names and texts of files."""

import logging
import os
import sys
import threading
import traceback
import warnings
from types import TracebackType
from typing import Any, TextIO

from jax_rlhf.io.printable import printable_lines


class _Record(logging.LogRecord):
    """A log record without control characters, whoever made it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.exc_info and self.exc_info[0] is not None:
            self.exc_text = _printable_trace(*self.exc_info)  # which formatters take as it is

    def getMessage(self) -> str:
        return printable_lines(super().getMessage())


class _Lasting:
    """A stream that nobody may read any more: what is written then goes nowhere, and nobody fails for it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError):
            self._give_up()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._give_up()

    def _give_up(self) -> None:
        """The pipe is closed, the terminal gone, the disk full: Python's last flush must not fail on it either."""
        try:
            number = self._stream.fileno()
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)
        except (OSError, ValueError):
            self._stream = open(os.devnull, "w")  # noqa: SIM115 — for as long as the process lives

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def make_output_harmless() -> None:
    """Takes escape sequences out of what goes to the terminal, and goes on where nobody reads it any more.

    Log records, warnings and uncaught exceptions pass through `jax_rlhf.io.printable`, as does what the program prints
    itself. A character that the terminal's encoding lacks is written as its escape. A pipe or terminal that is closed
    is no error. For programs: it changes how the whole process logs.
    """
    for number in range(3):  # one that was closed at the start would become the next file that is opened
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w")  # noqa: SIM115
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        if not isinstance(stream, _Lasting):
            setattr(sys, name, _Lasting(stream))
    logging.setLogRecordFactory(_Record)
    former = warnings.formatwarning
    warnings.formatwarning = lambda *args, **how: printable_lines(former(*args, **how))
    sys.excepthook = _print_trace
    threading.excepthook = lambda args: _print_trace(args.exc_type, args.exc_value, args.exc_traceback)
    sys.unraisablehook = lambda args: _print_trace(args.exc_type, args.exc_value, args.exc_traceback)


def _printable_trace(kind: Any, error: BaseException | None, trace: TracebackType | None) -> str:
    return printable_lines("".join(traceback.format_exception(kind, error, trace)).rstrip("\n"))


def _print_trace(kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
    if not issubclass(kind, SystemExit) and sys.stderr is not None:
        print(_printable_trace(kind, error, trace), file=sys.stderr)
