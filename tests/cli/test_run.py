"""The compile cache of the command line, and the errors of writer threads that it suppresses."""

import logging
import sys
import threading
import types

import pytest

from jax_rlhf.cli import run as command


@pytest.fixture
def cache(monkeypatch):
    """The settings of JAX that the command changes. JAX itself is replaced, so nothing is cached."""
    updated = {}
    config = types.SimpleNamespace(jax_compilation_cache_dir=None, update=updated.__setitem__)
    monkeypatch.setattr(command, "jax", types.SimpleNamespace(process_count=lambda: 1, config=config))
    return updated


CPU = "processor\t: 0\nvendor_id\t: A\nmodel name\t: B\ncpu MHz\t\t: {}\nflags\t\t: fpu {}\n\nprocessor\t: 1\n"


def test_the_compile_cache_depends_on_the_cpu_but_not_on_its_clock_rate(cache, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "_CPU_INFO", tmp_path / "cpuinfo")
    places = []
    for clock, features in ((2596.1, "avx"), (3100.7, "avx"), (2596.1, "avx avx512f")):
        (tmp_path / "cpuinfo").write_text(CPU.format(clock, features))
        command._keep_compiled(str(tmp_path / "kept"))
        places.append(cache["jax_compilation_cache_dir"])
    assert places[0] == places[1] != places[2]
    assert all(place.startswith(str(tmp_path / "kept")) for place in places)


@pytest.mark.parametrize("folder", ["", "~nobody-of-this-name/kept", "/proc/none"])
def test_without_a_usable_folder_compiled_programs_are_not_cached(cache, folder, caplog):
    command._keep_compiled(folder)
    assert cache == {}
    assert ("compiled programs are not kept" in caplog.text) == bool(folder)


@pytest.fixture
def said(monkeypatch):
    """The errors that threads and asyncio still report. Hooks and filters are restored afterwards."""
    said, asyncio = [], logging.getLogger("asyncio")
    monkeypatch.setattr(threading, "excepthook", lambda args: said.append(str(args.exc_value)))
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    for logger in (asyncio, logging.getLogger("absl")):
        monkeypatch.setattr(logger, "filters", list(logger.filters))
    handler = logging.Handler()
    handler.emit = lambda record: said.append(str(record.exc_info[1]))
    asyncio.addHandler(handler)
    command._silence_writer_threads()
    yield said
    asyncio.removeHandler(handler)


def raising(file, text):
    """A function that raises OSError, with a traceback that names this file."""
    scope = {}
    exec(compile(f"def fail():\n    raise OSError({text!r})", file, "exec"), scope)
    return scope["fail"]


WHERE = {"/lib/orbax/writer.py": False, "/lib/tensorstore/core.py": False, "/home/me/reward.py": True}


@pytest.mark.parametrize(("file", "shown"), WHERE.items())
def test_only_errors_of_orbax_and_tensorstore_are_suppressed(said, file, shown):
    thread = threading.Thread(target=raising(file, "of a thread"))
    thread.start()
    thread.join()
    try:
        raising(file, "of a task")()
    except OSError as error:
        logging.getLogger("asyncio").error("Task exception was never retrieved", exc_info=error)
    assert said == (["of a thread", "of a task"] if shown else [])


def test_an_asyncio_exception_without_frames_is_suppressed(said):
    """Exceptions from the C++ code of tensorstore have no Python frames."""
    logging.getLogger("asyncio").error("Future exception was never retrieved", exc_info=OSError("no space"))
    assert said == []
