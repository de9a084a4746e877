"""What other packages write to the terminal: log records, warnings and tracebacks, with names and texts of files."""

import logging
import sys
import threading
import traceback
import warnings
from types import TracebackType
from typing import Any

from jax_rlhf.text import printable_lines


class _Record(logging.LogRecord):
    """A log record without control characters, whoever made it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.exc_info and self.exc_info[0] is not None:
            self.exc_text = _printable_trace(*self.exc_info)  # which formatters take as it is

    def getMessage(self) -> str:
        return printable_lines(super().getMessage())


def make_output_harmless() -> None:
    """Takes escape sequences out of what goes to the terminal by log records, warnings and uncaught exceptions.

    What the program prints itself passes through `jax_rlhf.text`. A character that the terminal's encoding has not got
    is written as its escape. For programs: it changes how the whole process logs.
    """
    logging.setLogRecordFactory(_Record)
    former = warnings.formatwarning
    warnings.formatwarning = lambda *args, **how: printable_lines(former(*args, **how))
    sys.excepthook = _print_trace
    threading.excepthook = lambda args: _print_trace(args.exc_type, args.exc_value, args.exc_traceback)
    sys.unraisablehook = lambda args: _print_trace(args.exc_type, args.exc_value, args.exc_traceback)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _printable_trace(kind: Any, error: BaseException | None, trace: TracebackType | None) -> str:
    return printable_lines("".join(traceback.format_exception(kind, error, trace)).rstrip("\n"))


def _print_trace(kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
    if not issubclass(kind, SystemExit) and sys.stderr is not None:
        print(_printable_trace(kind, error, trace), file=sys.stderr)
