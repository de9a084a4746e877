"""Removes control characters from all output to the terminal: log records, warnings, and tracebacks."""

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
    """A log record without control characters, from any logger."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.exc_info and self.exc_info[0] is not None:
            self.exc_text = _printable_trace(*self.exc_info)  # formatters use it unchanged

    def getMessage(self) -> str:
        return printable_lines(super().getMessage())


class _Lasting:
    """A stream that does not fail when its reader is gone: further output is discarded."""

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
        """Redirects the stream to /dev/null after the pipe or terminal is closed or the disk is full.

        The file descriptor itself is redirected, so that Python's flush at exit does not fail either.
        """
        try:
            number = self._stream.fileno()
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, number)
            os.close(null)
        except (OSError, ValueError):
            self._stream = open(os.devnull, "w")  # noqa: SIM115 — for as long as the process lives

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def make_output_harmless() -> None:
    """Makes output to the terminal safe: without escape sequences, and without errors when the terminal is gone.

    Log records, warnings and uncaught exceptions pass through `jax_rlhf.io.printable`; the program itself uses it for
    all that it prints. A character that the terminal's encoding lacks is written as an escape. A closed pipe or
    terminal is not an error. Only programs should call this, because it changes logging of the whole process.
    """
    for number in range(3):  # the next file to be opened would get the number of a standard stream that is closed
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
    format_warning = warnings.formatwarning
    warnings.formatwarning = lambda *args, **keywords: printable_lines(format_warning(*args, **keywords))
    sys.excepthook = _print_trace
    threading.excepthook = lambda args: _print_trace(args.exc_type, args.exc_value, args.exc_traceback)
    sys.unraisablehook = lambda args: _print_trace(args.exc_type, args.exc_value, args.exc_traceback)


def _printable_trace(kind: Any, error: BaseException | None, trace: TracebackType | None) -> str:
    return printable_lines("".join(traceback.format_exception(kind, error, trace)).rstrip("\n"))


def _print_trace(kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
    if not issubclass(kind, SystemExit) and sys.stderr is not None:
        print(_printable_trace(kind, error, trace), file=sys.stderr)
