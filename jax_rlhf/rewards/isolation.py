"""Runs a reward function in a separate process, which is killed if a call takes too long, and restarted if it ends.

Whatever the function does there (`os._exit`, a segmentation fault, a fork, closing descriptors) ends that process only,
and counts as a failure of the call.
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
from jax_rlhf.rewards.calling import RewardInputs

_POLL_SECONDS = 0.5  # the process is polled, since its children may keep its socket open after it has ended
_END = 10.0  # seconds in which the process must end all that the function has started
_GREETING = 2**16  # the largest size of its first message, in bytes
_SCORE = 64  # the largest size of a number in a message, in bytes
_LONGEST_LINE = 2000  # its output is shown in lines of at most so many bytes


class IsolationError(Exception):
    """The function's process has not returned a result; the message says why, but does not name the function.

    Attributes:
      timed_out: the call took too long.
    """

    def __init__(self, message: str, *, timed_out: bool = False) -> None:
        super().__init__(message)
        self.timed_out = timed_out


class IsolatedFunction:
    """A function and its process. Calls from several threads run one after another."""

    def __init__(self, name: str, *, memory_gb: float | None = None) -> None:
        """Does not start the process yet.

        Args:
          name: "package.module:function".
          memory_gb: the largest address space of the process, in GB; None = no limit. The limit applies to each process
            that the function starts, too.
        """
        self.name, self._memory = name, round((memory_gb or 0) * 1e9)
        self._process: subprocess.Popen | None = None
        self._socket: socket.socket | None = None
        self._special: bool | None = None
        self._finalizer: weakref.finalize | None = None
        self._one_at_a_time = threading.Lock()

    def asks_for_special_tokens(self, timeout: float | None) -> bool:
        """Whether the function has a parameter for texts with special tokens; starts the process.

        Args:
          timeout: the longest duration of its import, in seconds.

        Raises:
          IsolationError: the function cannot be imported.
        """
        with self._one_at_a_time:
            if self._special is None:
                self._start(timeout)
            return bool(self._special)

    def __call__(self, inputs: RewardInputs, timeout: float | None) -> Any:
        """Calls the function.

        Args:
          inputs: the responses to score.
          timeout: the longest duration in seconds; None = no limit.

        Returns:
          The function's result, with lists instead of arrays.

        Raises:
          IsolationError: the function raised an exception or took too long, or its process ended.
        """
        try:
            content = worker.encode({field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)})
        except TypeError as error:
            raise IsolationError(f"a column of the data cannot be passed to it: {error}") from error
        with self._one_at_a_time:
            if self._process is None or self._process.poll() is not None:
                self._start(timeout)
            deadline = None if timeout is None else time.monotonic() + timeout
            self._send(content, deadline)
            reply = self._receive("returned", _GREETING + _SCORE * len(inputs), deadline)
        if "error" in reply:
            raise IsolationError(str(reply["error"]))
        return reply["returned"]

    def close(self) -> None:
        """Ends the process, and all processes that it started."""
        if self._finalizer is not None:
            self._finalizer()  # only once: another process may get the same id later
        self._process = self._socket = self._finalizer = None

    def _start(self, timeout: float | None) -> None:
        self.close()
        own_socket, worker_socket = socket.socketpair()
        command = [sys.executable, "-P", worker.__file__, str(worker_socket.fileno()), self.name, str(self._memory)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # when it closes, the process knows that the run has ended
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[worker_socket.fileno()],
            start_new_session=True,  # Ctrl-C must reach the run only
            env=os.environ | {"JAX_PLATFORMS": "cpu"},  # the run uses the devices
        )
        worker_socket.close()
        self._socket = own_socket
        self._finalizer = weakref.finalize(self, _end, self._process, own_socket)
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
            sent = self._until(lambda connection: connection.send(left[: 2**20]), deadline)  # noqa: B023 — called here
            left = left[sent:]

    def _receive(self, what: str, most: int, deadline: float | None) -> dict[str, Any]:
        """A message with the key `what` or "error", of at most `most` bytes."""
        (length,) = worker.LENGTH.unpack(self._exactly(worker.LENGTH.size, deadline))
        if length > most:
            self._fail(f"it answered with {length:,} bytes, more than a number per response needs")
        try:
            reply = json.loads(self._exactly(length, deadline))
        except ValueError:
            reply = None
        if not isinstance(reply, dict) or not reply.keys() & {what, "error"}:
            self._fail("its socket contains data that is not an answer")
        return reply

    def _exactly(self, count: int, deadline: float | None) -> bytes:
        pieces = []
        while count:
            piece = self._until(lambda connection: connection.recv(min(count, 2**20)), deadline)  # noqa: B023 — called here
            if not piece:
                self._fail(self._exit_reason())
            pieces.append(piece)
            count -= len(piece)
        return b"".join(pieces)

    def _until(self, do: Callable[[socket.socket], Any], deadline: float | None) -> Any:
        """Repeats a socket operation until it succeeds, the deadline passes, or the process has ended."""
        connection, process = self._socket, self._process
        assert connection is not None, "the process was started"
        assert process is not None, "the process was started"
        while True:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                self.close()
                raise IsolationError("it took too long", timed_out=True)
            connection.settimeout(_POLL_SECONDS if left is None else min(_POLL_SECONDS, left))
            try:
                return do(connection)
            except TimeoutError:
                if process.poll() is not None:
                    self._fail(self._exit_reason())
            except OSError:  # the process has ended
                self._fail(self._exit_reason())

    def _exit_reason(self) -> str:
        process = self._process
        assert process is not None, "the process was started"
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5.0)  # its socket may close before it ends
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
    process.stdin.close()  # then the process ends all that the function has started, and itself
    try:
        process.wait(_END)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _show(stream: BinaryIO, name: str) -> None:
    """Copies the output of the function to stderr, line by line."""
    with contextlib.suppress(ValueError, OSError), stream:
        while line := stream.readline(_LONGEST_LINE):
            text = printable(line.decode(errors="replace").rstrip("\n"), _LONGEST_LINE)
            print(f"{name}: {text}", file=sys.stderr)
