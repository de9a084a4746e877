"""A program of its own: ends the process that started it where not even that one's watchdog thread runs any more.

It reads lines from stdin, each the seconds within which the next one must come. No signal of the other process is
used: `SIGALRM` may be a reward function's. It imports nothing but Python's own modules, so that it starts fast.
"""

import os
import select
import signal
import sys
import time
from pathlib import Path

_AFTER_ABORT = 10.0  # seconds in which stacks are written


def main(margin: float) -> None:
    """Waits until stdin is closed, or ends the other process.

    Args:
      margin: seconds that it has once more after a line that did not come: both may have been stopped and gone on.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # of a terminal; they are the other's
        signal.signal(number, signal.SIG_IGN)
    other, seconds, late = os.getppid(), None, False
    while True:
        if select.select([0], [], [], seconds)[0]:
            lines = os.read(0, 2**16).split()
            if not lines:
                return
            seconds, late = float(lines[-1]), False
        elif late and not _is_stopped(other):
            _end(other)
            return
        else:
            seconds, late = margin, True


def _is_stopped(process: int) -> bool:
    """Whether somebody has stopped it (Ctrl-Z, a debugger, a scheduler)."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except OSError:  # not Linux
        return False


def _end(process: int) -> None:
    if os.getppid() != process:
        return
    os.write(2, b"\nPython has not run for too long (C code may hold its lock); the process is ended.\n")
    os.kill(process, signal.SIGABRT)  # upon which faulthandler writes all threads' stacks
    until = time.monotonic() + _AFTER_ABORT
    while os.getppid() == process and time.monotonic() < until:
        time.sleep(0.1)
    if os.getppid() == process:
        os.kill(process, signal.SIGKILL)


if __name__ == "__main__":
    main(float(sys.argv[1]))
