"""A reward function in a process of its own, which is killed where it takes too long, and started again where it ends.

Whatever it does there (`os._exit`, a segmentation fault, a fork, closing descriptors) ends its own process, and is a
failure of that call.
"""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, BinaryIO, NoReturn

from jax_rlhf.io.printable import printable
from jax_rlhf.rewards import worker
from jax_rlhf.rewards.calling import Answers

_LOOK_EVERY = 0.5  # seconds; a child of the function may hold the socket of a process that is gone
_END = 10.0  # seconds in which the process ends what the function has started
_GREETING = 2**16  # bytes
_SCORE = 64  # bytes of a number
_LONGEST_LINE = 2000  # bytes of what it prints that are shown together


class IsolationError(Exception):
    """The function's process has not answered; the message says why, and not whose.

    Attributes:
      timed_out: it took too long.
    """

    def __init__(self, message: str, *, timed_out: bool = False) -> None:
        super().__init__(message)
        self.timed_out = timed_out


class IsolatedFunction:
    """One function, and its process as long as it lives. Calls from several threads come one after another."""

    def __init__(self, name: str, *, memory_gb: float | None = None) -> None:
        """Starts nothing yet.

        Args:
          name: "package.module:function".
          memory_gb: address space that a process may take, in GB; None = no limit. Each that the function starts has
            as much.
        """
        self.name, self._memory = name, round((memory_gb or 0) * 1e9)
        self._process: subprocess.Popen | None = None
        self._socket: socket.socket | None = None
        self._special: bool | None = None
        self._finalizer: weakref.finalize | None = None
        self._one_at_a_time = threading.Lock()

    def asks_for_special_tokens(self, timeout: float | None) -> bool:
        """Whether it has a parameter for texts with special tokens; starts the process.

        Args:
          timeout: seconds that its import may take.

        Returns:
          Whether.

        Raises:
          IsolationError: it cannot be imported.
        """
        with self._one_at_a_time:
            if self._special is None:
                self._start(timeout)
            return bool(self._special)

    def __call__(self, answers: Answers, timeout: float | None) -> Any:
        """Calls it.

        Args:
          answers: what it scores.
          timeout: seconds that it may take; None = for ever.

        Returns:
          What it returned, in lists.

        Raises:
          IsolationError: it raised an exception, took too long, or its process ended.
        """
        try:
            content = worker.encode({field.name: getattr(answers, field.name) for field in dataclasses.fields(answers)})
        except TypeError as error:
            raise IsolationError(f"a column of the data cannot be passed to it: {error}") from error
        with self._one_at_a_time:
            if self._process is None or self._process.poll() is not None:
                self._start(timeout)
            deadline = None if timeout is None else time.monotonic() + timeout
            self._send(content, deadline)
            reply = self._receive("returned", _GREETING + _SCORE * len(answers), deadline)
        if "error" in reply:
            raise IsolationError(str(reply["error"]))
        return reply["returned"]

    def close(self) -> None:
        """Ends the process, and what it started."""
        if self._finalizer is not None:
            self._finalizer()  # once: its number may be another process's later
        self._process = self._socket = self._finalizer = None

    def _start(self, timeout: float | None) -> None:
        self.close()
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-P", worker.__file__, str(theirs.fileno()), self.name, str(self._memory)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # by whose end it knows that the run has ended
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C is the run's
            env=os.environ | {"JAX_PLATFORMS": "cpu"},  # the devices are the run's
        )
        theirs.close()
        self._socket = ours
        self._finalizer = weakref.finalize(self, _end, self._process, ours)
        threading.Thread(target=_show, args=(self._process.stdout, self.name), daemon=True).start()
        deadline = None if timeout is None else time.monotonic() + timeout
        self._send(sys.path, deadline)
        hello = self._receive("special", _GREETING, deadline)
        if "error" in hello:
            self.close()
            raise IsolationError(str(hello["error"]))
        self._special = bool(hello["special"])

    def _send(self, content: Any, deadline: float | None) -> None:
        message = json.dumps(content).encode()
        left = memoryview(worker.LENGTH.pack(len(message)) + message)
        while left:
            sent = self._tried(lambda connection: connection.send(left[: 2**20]), deadline)  # noqa: B023 — called here
            left = left[sent:]

    def _receive(self, what: str, most: int, deadline: float | None) -> dict[str, Any]:
        """A message that has `what`, or "error", in no more bytes than its scores can need."""
        (length,) = worker.LENGTH.unpack(self._exactly(worker.LENGTH.size, deadline))
        if length > most:
            self._fail(f"it answered with {length:,} bytes, more than a number for each response takes")
        try:
            reply = json.loads(self._exactly(length, deadline))
        except ValueError:
            reply = None
        if not isinstance(reply, dict) or not reply.keys() & {what, "error"}:
            self._fail("something else was written to its socket")
        return reply

    def _exactly(self, count: int, deadline: float | None) -> bytes:
        pieces = []
        while count:
            piece = self._tried(lambda connection: connection.recv(min(count, 2**20)), deadline)  # noqa: B023 — called here
            if not piece:
                self._fail(self._how_it_ended())
            pieces.append(piece)
            count -= len(piece)
        return b"".join(pieces)

    def _tried(self, do: Callable[[socket.socket], Any], deadline: float | None) -> Any:
        connection, process = self._socket, self._process
        assert connection is not None, "it was started"
        assert process is not None, "it was started"
        while True:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                self.close()
                raise IsolationError("it took too long", timed_out=True)
            connection.settimeout(_LOOK_EVERY if left is None else min(_LOOK_EVERY, left))
            try:
                return do(connection)
            except TimeoutError:
                if process.poll() is not None:
                    self._fail(self._how_it_ended())
            except OSError:  # it is gone
                self._fail(self._how_it_ended())

    def _how_it_ended(self) -> str:
        process = self._process
        assert process is not None, "it was started"
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5.0)  # its socket may be closed first
        code = process.poll()
        if code is None:
            return "it closed its socket"
        if code < 0:
            named = code and signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
            return f"its process was ended by {named}"
        return f"its process ended with exit code {code}"

    def _fail(self, message: str) -> NoReturn:
        self.close()
        raise IsolationError(message)


def _end(process: subprocess.Popen, connection: socket.socket) -> None:
    connection.close()
    assert process.stdin is not None
    process.stdin.close()  # it ends then, after all that the function has started
    try:
        process.wait(_END)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _show(stream: BinaryIO, name: str) -> None:
    """What it prints, on stderr."""
    with contextlib.suppress(ValueError, OSError), stream:
        while line := stream.readline(_LONGEST_LINE):
            text = printable(line.decode(errors="replace").rstrip("\n"), _LONGEST_LINE)
            print(f"{name}: {text}", file=sys.stderr)
