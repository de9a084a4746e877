"""A program of its own: calls one reward function for another process, which it cannot harm.

It is run by its path and imports nothing of this package but `calling.py`, so that it starts fast and JAX is not in it.
Both ends speak JSON over a socket, each message behind its length: nothing that a function returns is unpickled.

It forks: a child calls the function, and the parent waits. Once the child has ended, or the run has (its end of stdin
is closed), the parent ends all that the child has started.
"""

import asyncio
import contextlib
import ctypes
import datetime
import decimal
import importlib
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

LENGTH = struct.Struct("<Q")
_TAG = "\0"
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER
_LOOK_EVERY = 2.0  # seconds; another child of the run may hold the other end of stdin
_SAID = {"datetime": datetime.datetime, "date": datetime.date, "time": datetime.time}


def encode(value: Any) -> Any:
    """What JSON can hold of a column's value.

    Args:
      value: of a row: what JSON knows, bytes, dates and times, decimals, NumPy's numbers and arrays.

    Returns:
      For `decode`.

    Raises:
      TypeError: it is something else.
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
    for name, kind in _SAID.items():
        if isinstance(value, kind):
            return [_TAG, name, value.isoformat()]
    if isinstance(value, decimal.Decimal):
        return [_TAG, "decimal", str(value)]
    if hasattr(value, "tolist"):
        return encode(value.tolist())
    raise TypeError(f"a {type(value).__name__} cannot be passed to another process")


def decode(value: Any) -> Any:
    """The inverse of `encode`; tuples and arrays have become lists.

    Args:
      value: from `encode`.

    Returns:
      The value.
    """
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
    return decimal.Decimal(content) if kind == "decimal" else _SAID[kind].fromisoformat(content)


def main(socket_number: int, name: str, memory: int) -> None:
    """Answers requests until the other end is gone, and ends as the process does that calls the function.

    Args:
      socket_number: the file descriptor of a connected socket. The first message names Python's search path.
      name: "package.module:function".
      memory: bytes of address space of a process; 0 = no limit.
    """
    run = os.getppid()
    with contextlib.suppress(AttributeError, OSError):  # Linux alone; what has lost its parent is ours then
        ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    child = os.fork()
    if child == 0:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        _serve(socket.socket(fileno=socket_number), name, memory)
        os._exit(0)
    os.close(socket_number)
    _end_as(_waited_for(child, run))


def _waited_for(child: int, run: int) -> int:
    """How the child ended, by itself or since the run is gone; nothing that it started is left then."""
    ended, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    status = None
    while status is None and os.getppid() == run:
        found, how = os.waitpid(-1, os.WNOHANG)
        if found == child:
            status = how
        elif found == 0:
            ready = select.select([0, ended], [], [], _LOOK_EVERY)[0]
            if 0 in ready:
                break  # nothing is ever written to stdin
            if ended in ready:
                os.read(ended, 2**10)
    if sys.platform != "linux" and status is None:
        os.killpg(child, signal.SIGKILL)
    while children := _children():
        for process in children:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            found, how = os.waitpid(-1, 0)
            status = how if found == child and status is None else status
    return 0 if status is None else status


def _children() -> list[int]:
    """Of this process; as it is their reaper, all that the function has started become its own."""
    found = []
    for entry in Path("/proc").iterdir() if Path("/proc/self").exists() else ():
        with contextlib.suppress(OSError, ValueError, IndexError):  # it has ended meanwhile
            if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(entry.name))
    return found


def _end_as(status: int) -> None:
    if os.WIFSIGNALED(status):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with contextlib.suppress(OSError):  # SIGKILL needs none
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
    calling = _calling()
    try:
        function = _imported(name)
        _send(connection, {"special": calling.asks_for_special_tokens(function)})
    except BaseException as error:
        _send(connection, {"error": f"cannot be imported: {_in_words(error)}"})
        return
    while True:
        answers = calling.Answers(**decode(_receive(connection)))
        try:
            positional, keywords = calling.arguments(function, answers)
            reply = {"returned": _plain(_awaited(function(*positional, **keywords)))}
        except BaseException as error:  # SystemExit too
            reply = {"error": _in_words(error)}
        if os.getpid() != process:  # a child that the function forked, and that came back here as well
            os._exit(0)
        _send(connection, reply)


def _calling() -> Any:
    """`calling.py`, without the package around it."""
    spec = importlib.util.spec_from_file_location("jax_rlhf_calling", Path(__file__).with_name("calling.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _imported(name: str) -> Callable:
    module, _, attribute = name.partition(":")
    function: Any = importlib.import_module(module)
    for part in attribute.split("."):
        function = getattr(function, part)
    if not callable(function):
        raise TypeError(f"it is a {type(function).__name__}, not a function")
    return function


def _awaited(returned: Any) -> Any:
    async def wait() -> Any:
        return await returned

    return asyncio.run(wait()) if inspect.isawaitable(returned) else returned


def _plain(returned: Any) -> Any:
    """Numbers and Nones in lists, as they were returned; what is none of these in words."""
    if hasattr(returned, "tolist"):
        returned = returned.tolist()
    if isinstance(returned, list | tuple):
        return [_plain(inner) for inner in returned]
    if returned is None or isinstance(returned, bool | int | float):
        return returned
    with contextlib.suppress(TypeError, ValueError):
        return float(returned)
    raise TypeError(f"it returned a {type(returned).__name__} where a number is expected")


def _in_words(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    try:
        text = str(error)[:400]
    except Exception:  # it is somebody else's class
        text = "(without words)"
    return f"{type(error).__name__}: {text}{place}"


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
