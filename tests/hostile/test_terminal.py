"""Runs whose output cannot be written: to a closed pipe, a closed terminal, or closed streams."""

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


def test_a_closed_output_pipe_does_not_end_the_run(folder):
    code, printed, errors = in_shell(folder, " 2>&1 | head -n 1", *STEPS)
    assert (code, errors) == (0, "")
    assert len(printed.splitlines()) == 1
    assert json.loads((folder / "run" / "sft" / "summary.json").read_text())["finished"]


def test_streams_closed_from_the_start_do_not_end_the_run(folder):
    """The output of C libraries does not go into the first file that the run opens."""
    code, printed, errors = in_shell(folder, " <&- >&- 2>&-", *STEPS)
    assert (code, printed, errors) == (0, "", "")
    assert [line["step"] for line in alone.lines(folder / "run" / "sft" / "metrics.jsonl")] == [0, 1, 2, 3, 3]


def begun(process, metrics):
    """Waits until the run has done a step. The first lines of metrics are from the evaluation before it."""
    until = time.time() + 200
    while time.time() < until and process.poll() is None and '"step": 1,' not in text_of(metrics):
        time.sleep(0.1)
    assert process.poll() is None


def text_of(file):
    return file.read_text() if file.exists() else ""


# SIGHUP may be ignored where the tests run, for example under nohup, and child processes inherit that.
ATTACH = """
import fcntl, os, signal, sys, termios
signal.signal(signal.SIGHUP, signal.SIG_DFL)
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_a_closed_terminal_makes_the_run_save_and_end(folder):
    """The kernel sends SIGHUP, and every later print fails."""
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


def test_an_ignored_sighup_stays_ignored(monkeypatch):
    """nohup ignores SIGHUP."""
    installed = {}
    monkeypatch.setattr(signal, "signal", lambda number, handler: installed.setdefault(number, handler))
    for ignored in (True, False):
        installed.clear()
        monkeypatch.setattr(signal, "getsignal", lambda number, off=ignored: signal.SIG_IGN if off else signal.SIG_DFL)
        StopSignals().install()
        assert (signal.SIGHUP in installed) != ignored
        assert {signal.SIGINT, signal.SIGTERM} <= installed.keys()


def test_a_stream_closed_during_the_run_does_not_end_it(tmp_path):
    """A reward function or a library may close a stream."""
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
