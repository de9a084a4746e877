"""A separate program: calls one reward function for the process of a run, which the function then cannot harm.

It is run by its path. Of this package it loads `calling.py` and `import_function.py` alone, so that it starts fast and
without JAX. Both processes exchange JSON messages over a socket, each with its length before it. So no result of a
function is unpickled.

The program forks: a child calls the function, and the parent waits. When the child ends, or when the run ends (which
closes stdin), the parent kills all processes that the child has started.
"""

import asyncio
import contextlib
import ctypes
import datetime
import decimal
import importlib.util
import inspect
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import traceback
from pathlib import Path
from typing import Any

LENGTH = struct.Struct("<Q")
_TAG = "\0"
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER
_POLL_SECONDS = 2.0  # the run is polled, since another child of it may keep the other end of stdin open
_ISO_TYPES = {"datetime": datetime.datetime, "date": datetime.date, "time": datetime.time}


def encode(value: Any) -> Any:
    """Converts the value of a column to JSON-compatible data for `decode`.

    Args:
      value: a JSON value, bytes, date, time, decimal, or NumPy number or array.

    Raises:
      TypeError: the value has another type.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return [_TAG, "dict", [[encode(key), encode(inner)] for key, inner in value.items()]]
    if isinstance(value, list | tuple):
        return ["", [encode(inner) for inner in value]]
    if isinstance(value, bytes | bytearray):
        return [_TAG, "bytes", value.hex()]
    if isinstance(value, datetime.timedelta):
        return [_TAG, "timedelta", value.total_seconds()]
    for name, kind in _ISO_TYPES.items():
        if isinstance(value, kind):
            return [_TAG, name, value.isoformat()]
    if isinstance(value, decimal.Decimal):
        return [_TAG, "decimal", str(value)]
    if hasattr(value, "tolist"):
        return encode(value.tolist())
    raise TypeError(f"a {type(value).__name__} cannot be passed to another process")


def decode(value: Any) -> Any:
    """The inverse of `encode`, except that tuples and arrays become lists."""
    if not isinstance(value, list):
        return value
    if value[0] != _TAG:
        return [decode(inner) for inner in value[1]]
    _, kind, content = value
    if kind == "dict":
        return {decode(key): decode(inner) for key, inner in content}
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "timedelta":
        return datetime.timedelta(seconds=content)
    return decimal.Decimal(content) if kind == "decimal" else _ISO_TYPES[kind].fromisoformat(content)


def main(socket_number: int, name: str, memory: int) -> None:
    """Answers requests until the run ends; exits with the status of the child that calls the function.

    Args:
      socket_number: the file descriptor of a connected socket. The first message is Python's search path.
      name: "package.module:function" or "FILE.py:function".
      memory: the largest address space of a process, in bytes; 0 = no limit.
    """
    run = os.getppid()
    with contextlib.suppress(AttributeError, OSError):  # Linux only; this process then adopts orphaned descendants
        ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    child = os.fork()
    if child == 0:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        _serve(socket.socket(fileno=socket_number), name, memory)
        os._exit(0)
    os.close(socket_number)
    _exit_with(_wait_for(child, run))


def _wait_for(child: int, run: int) -> int:
    """Waits until the child or the run ends, kills all that the child has started, and returns the child's status."""
    ended, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    status = None
    while status is None and os.getppid() == run:
        found, exit_status = os.waitpid(-1, os.WNOHANG)
        if found == child:
            status = exit_status
        elif found == 0:
            ready = select.select([0, ended], [], [], _POLL_SECONDS)[0]
            if 0 in ready:
                break  # closed, since the run never writes to stdin
            if ended in ready:
                os.read(ended, 2**10)
    if sys.platform != "linux" and status is None:
        os.killpg(child, signal.SIGKILL)
    while children := _children():
        for process in children:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            found, exit_status = os.waitpid(-1, 0)
            status = exit_status if found == child and status is None else status
    return 0 if status is None else status


def _children() -> list[int]:
    """Children of this process. As it is a subreaper, all that the function has started become its children."""
    found = []
    for entry in Path("/proc").iterdir() if Path("/proc/self").exists() else ():
        with contextlib.suppress(OSError, ValueError, IndexError):  # the process has ended meanwhile
            if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(entry.name))
    return found


def _exit_with(status: int) -> None:
    """Ends this process with an exit status of `os.waitpid`: the same signal or exit code."""
    if os.WIFSIGNALED(status):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with contextlib.suppress(OSError):  # SIGKILL cannot have a handler
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.waitstatus_to_exitcode(status) & 255)


def _serve(connection: socket.socket, name: str, memory: int) -> None:
    process = os.getpid()
    if memory:
        most = resource.getrlimit(resource.RLIMIT_AS)[1]
        memory = memory if most == resource.RLIM_INFINITY else min(memory, most)
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    sys.path[:] = _receive(connection)
    calling, importing = _load("rewards/calling.py"), _load("io/import_function.py")
    try:
        function = importing.import_function(name)
        _send(connection, {"special": calling.asks_for_special_tokens(function)})
    except BaseException as error:
        _send(connection, {"error": f"cannot be imported: {_describe(error)}"})
        return
    while True:
        inputs = calling.RewardInputs(**decode(_receive(connection)))
        try:
            positional, keywords = calling.arguments(function, inputs)
            reply = {"returned": _plain(_awaited(function(*positional, **keywords)))}
        except BaseException as error:  # also SystemExit
            reply = {"error": _describe(error)}
        if os.getpid() != process:  # a child that the function has forked also returns here
            os._exit(0)
        _send(connection, reply)


def _load(file: str) -> Any:
    """A module of the package, without the package around it."""
    path = Path(__file__).parents[1] / file
    spec = importlib.util.spec_from_file_location(f"jax_rlhf_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _awaited(returned: Any) -> Any:
    async def wait() -> Any:
        return await returned

    return asyncio.run(wait()) if inspect.isawaitable(returned) else returned


def _plain(returned: Any) -> Any:
    """The result as numbers and Nones in lists; TypeError for anything else."""
    if hasattr(returned, "tolist"):
        returned = returned.tolist()
    if isinstance(returned, list | tuple):
        return [_plain(inner) for inner in returned]
    if returned is None or isinstance(returned, bool | int | float):
        return returned
    with contextlib.suppress(TypeError, ValueError):
        return float(returned)
    raise TypeError(f"it returned a {type(returned).__name__} instead of a number")


def _describe(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    location = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    try:
        text = str(error)[:400]
    except Exception:  # `__str__` of a user's class may fail
        text = "(no message)"
    return f"{type(error).__name__}: {text}{location}"


def _send(connection: socket.socket, content: Any) -> None:
    message = json.dumps(content).encode()
    connection.sendall(LENGTH.pack(len(message)) + message)


def _receive(connection: socket.socket) -> Any:
    (length,) = LENGTH.unpack(_exactly(connection, LENGTH.size))
    return json.loads(_exactly(connection, length))


def _exactly(connection: socket.socket, count: int) -> bytes:
    pieces = []
    while count:
        piece = connection.recv(min(count, 2**20))
        if not piece:
            os._exit(0)  # the run has ended
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
