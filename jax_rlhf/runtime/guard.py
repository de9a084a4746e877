"""A separate process that kills the one which started it, if not even the watchdog thread runs there any more.

It reads heartbeats from stdin: lines with the seconds within which the next line must come. A timer signal in the
watched process would not do, since a reward function may use `SIGALRM`. Only modules of the standard library are
imported, so that the process starts fast.
"""

import os
import select
import signal
import sys
import time
from pathlib import Path

_AFTER_ABORT = 10.0  # seconds to write the stacks


def main(margin: float) -> None:
    """Returns when stdin is closed. Kills the watched process if a heartbeat is missing.

    Args:
      margin: seconds of grace after a missing heartbeat, since both processes may have been suspended and resumed.
    """
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
    ):  # a terminal sends them to both; only the watched process handles them
        signal.signal(number, signal.SIG_IGN)
    watched, seconds, late = os.getppid(), None, False
    while True:
        if select.select([0], [], [], seconds)[0]:
            lines = os.read(0, 2**16).split()
            if not lines:
                return
            seconds, late = float(lines[-1]), False
        elif late and not _is_suspended(watched):
            _kill(watched)
            return
        else:
            seconds, late = margin, True


def _is_suspended(process: int) -> bool:
    """Whether a process is suspended (by Ctrl-Z, a debugger or a scheduler); False if that is unknown."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except OSError:  # not Linux
        return False


def _kill(process: int) -> None:
    if os.getppid() != process:
        return
    os.write(2, b"\nno Python code has run for too long (C code may hold the GIL); the process is killed.\n")
    os.kill(process, signal.SIGABRT)  # makes faulthandler write the stacks of all threads
    until = time.monotonic() + _AFTER_ABORT
    while os.getppid() == process and time.monotonic() < until:
        time.sleep(0.1)
    if os.getppid() == process:
        os.kill(process, signal.SIGKILL)


if __name__ == "__main__":
    main(float(sys.argv[1]))
