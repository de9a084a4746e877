"""Nobody reads what a run prints any more: a closed pipe, a terminal that is gone, streams closed from the start."""

import json
import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from jax_rlhf.runtime.preemption import StopSignals
from tests.cli import test_end_to_end as alone, tiny
from tests.processes import ROOT

STEPS = ("--config.phases=sft", "--config.sft.steps=3")
ENDLESS = ("--config.phases=sft", "--config.sft.steps=100000")


@pytest.fixture
def folder(tmp_path):
    tiny.config(tmp_path)
    return tmp_path


def in_shell(folder, after, *flags):
    command = " ".join(alone.command(folder, *flags)) + after
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=folder, env=alone.environment(), capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


def test_a_reader_that_goes_away_ends_nothing(folder):
    code, printed, errors = in_shell(folder, " 2>&1 | head -n 1", *STEPS)
    assert (code, errors) == (0, "")
    assert len(printed.splitlines()) == 1
    assert json.loads((folder / "run" / "sft" / "summary.json").read_text())["finished"]


def test_streams_that_are_closed_from_the_start_end_nothing(folder):
    """And what C libraries print does not go into the first file that is opened."""
    code, printed, errors = in_shell(folder, " <&- >&- 2>&-", *STEPS)
    assert (code, printed, errors) == (0, "", "")
    assert [line["step"] for line in alone.lines(folder / "run" / "sft" / "metrics.jsonl")] == [0, 1, 2, 3, 3]


def begun(process, metrics):
    """Waits until it has done a step; the first lines are of the evaluation before."""
    until = time.time() + 200
    while time.time() < until and process.poll() is None and '"step": 1,' not in text_of(metrics):
        time.sleep(0.1)
    assert process.poll() is None


def text_of(file):
    return file.read_text() if file.exists() else ""


# Whoever runs the tests may ignore SIGHUP, as nohup does, and that is inherited.
ATTACH = """
import fcntl, os, signal, sys, termios
signal.signal(signal.SIGHUP, signal.SIG_DFL)
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_a_terminal_that_is_closed_saves_and_ends(folder):
    """The kernel sends SIGHUP, and all that is printed after that fails."""
    here, there = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", ATTACH, *alone.command(folder, *ENDLESS)],
        cwd=folder,
        env=alone.environment(),
        stdin=there,
        stdout=there,
        stderr=there,
        start_new_session=True,
    )
    os.close(there)
    metrics = folder / "run" / "sft" / "metrics.jsonl"
    begun(process, metrics)
    os.close(here)
    try:
        assert process.wait(100) == 75
    finally:
        process.kill()
    (checkpoint,) = (folder / "run" / "sft" / "checkpoints").iterdir()
    assert int(checkpoint.name) == alone.lines(metrics)[-1]["step"]


def test_under_nohup_a_hang_up_is_nothing(monkeypatch):
    """What ignores SIGHUP goes on ignoring it."""
    installed = {}
    monkeypatch.setattr(signal, "signal", lambda number, handler: installed.setdefault(number, handler))
    for ignored in (True, False):
        installed.clear()
        monkeypatch.setattr(signal, "getsignal", lambda number, how=ignored: signal.SIG_IGN if how else signal.SIG_DFL)
        StopSignals().install()
        assert (signal.SIGHUP in installed) != ignored
        assert {signal.SIGINT, signal.SIGTERM} <= installed.keys()


def test_what_closes_a_stream_under_way_ends_nothing(tmp_path):
    """A reward function may do that, or a library."""
    code = f"""
import os, sys
from jax_rlhf.io.terminal import make_output_harmless
make_output_harmless()
sys.stdout.close()
sys.stderr.close()
file = open({str(tmp_path / "x")!r}, "w")
for stream in (sys.stdout, sys.stderr):
    print("a" * 100_000, file=stream, flush=True)
file.write("whole")
file.close()
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    assert (tmp_path / "x").read_text() == "whole"
