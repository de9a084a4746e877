"""A program of its own: calls one reward function for another process, which it cannot harm.

It is run by its path and imports nothing of this package but `calling.py`, so that it starts fast and JAX is not in it.
Both ends speak JSON over a socket, each message behind its length: nothing that a function returns is unpickled.
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
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

LENGTH = struct.Struct("<Q")
LONGEST = 2**30
"""Bytes of a message."""
_TAG = "\0"
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
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
    """Answers requests until the other end is gone.

    Args:
      socket_number: the file descriptor of a connected socket. The first message names Python's search path.
      name: "package.module:function".
      memory: bytes of address space; 0 = no limit.
    """
    with contextlib.suppress(AttributeError, OSError):  # Linux alone
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if memory:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    connection, process = socket.socket(fileno=socket_number), os.getpid()
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
    return f"{type(error).__name__}: {str(error)[:400]}{place}"


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
