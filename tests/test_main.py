"""What the command line lets others say."""

import logging
import sys
import threading

import pytest

from jax_rlhf import __main__ as command


@pytest.fixture
def said(monkeypatch):
    """What threads and asyncio still say, with hooks and filters as they were afterwards."""
    said, asyncio = [], logging.getLogger("asyncio")
    monkeypatch.setattr(threading, "excepthook", lambda args: said.append(str(args.exc_value)))
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    for logger in (asyncio, logging.getLogger("absl")):
        monkeypatch.setattr(logger, "filters", list(logger.filters))
    handler = logging.Handler()
    handler.emit = lambda record: said.append(str(record.exc_info[1]))
    asyncio.addHandler(handler)
    command._quieten_writers()
    yield said
    asyncio.removeHandler(handler)


def raising(file, text):
    """A function that raises in a file of some name."""
    scope = {}
    exec(compile(f"def fail():\n    raise OSError({text!r})", file, "exec"), scope)
    return scope["fail"]


WHERE = {"/lib/orbax/writer.py": False, "/lib/tensorstore/core.py": False, "/home/me/reward.py": True}


@pytest.mark.parametrize(("file", "shown"), WHERE.items())
def test_of_writers_alone_nothing_is_said_of_threads_and_tasks(said, file, shown):
    thread = threading.Thread(target=raising(file, "of a thread"))
    thread.start()
    thread.join()
    try:
        raising(file, "of a task")()
    except OSError as error:
        logging.getLogger("asyncio").error("Task exception was never retrieved", exc_info=error)
    assert said == (["of a thread", "of a task"] if shown else [])


def test_of_an_exception_without_frames_asyncio_says_nothing(said):
    """It comes from tensorstore's C++."""
    logging.getLogger("asyncio").error("Future exception was never retrieved", exc_info=OSError("no space"))
    assert said == []
