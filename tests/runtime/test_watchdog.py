"""The watchdog detects a stalled run, and leaves a slow one alone."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from jax_rlhf.runtime import watchdog
from jax_rlhf.runtime.config import WatchdogConfig
from jax_rlhf.runtime.watchdog import Watchdog
from tests.cli import test_end_to_end as alone, tiny
from tests.processes import ROOT

SOON = 0.01  # minutes


def watched(folder, sign=lambda: 0, said=None, **options):
    config = WatchdogConfig(**{"minutes": SOON, "factor": 5.0, "action": "warn"} | options)
    return Watchdog(config, folder, [sign], (said if said is not None else []).append)


def test_where_nothing_is_done_the_stacks_of_all_threads_are_written(tmp_path):
    said, end = [], threading.Event()

    def waits_for_ever():
        end.wait()

    thread = threading.Thread(target=waits_for_ever)
    thread.start()
    with watched(tmp_path, said=said):
        until = time.monotonic() + 20
        while len(said) < 2 and time.monotonic() < until:
            time.sleep(0.05)
    end.set()
    thread.join()
    assert "no progress for 1 seconds" in said[0].replace("for 0 ", "for 1 ")
    assert len(said) >= 2  # the message is repeated
    stacks = (tmp_path / "stacks.txt").read_text()
    assert "waits_for_ever" in stacks
    assert "test_where_nothing_is_done" in stacks


def test_steps_activity_and_growing_files_count_as_progress(tmp_path):
    said, count = [], [0]
    with watched(tmp_path, said=said) as dog:
        for _ in range(20):
            dog.step()
            time.sleep(0.1)
    with watched(tmp_path, lambda: count[0], said=said):
        for _ in range(20):
            count[0] += 1
            time.sleep(0.1)
    (tmp_path / "checkpoints").mkdir()
    with watched(tmp_path, said=said), (tmp_path / "checkpoints" / "x").open("wb", buffering=0) as file:
        for _ in range(20):
            file.write(b"x")
            time.sleep(0.1)
    assert said == []


def test_the_limit_grows_with_the_duration_of_the_steps(tmp_path):
    said = []
    with watched(tmp_path, said=said) as dog:
        assert dog.limit == 60 * SOON
        for _ in range(3):
            time.sleep(0.3)
            dog.step()
        assert 1.5 <= dog.limit < 2.5  # five times the median
        time.sleep(1.2)
        assert said == []
        time.sleep(2.5)
    assert said


def test_the_watchdog_thread_ends_with_the_phase(tmp_path):
    said = []
    before = threading.active_count()
    with pytest.raises(KeyError), watched(tmp_path, said=said) as dog:
        raise KeyError
    assert threading.active_count() == before
    with dog:  # it can be entered again
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    with watched(tmp_path, said=said, action="off"):
        assert threading.active_count() == before
        time.sleep(1.0)
    assert said == []


def test_a_failing_watchdog_thread_ends_its_guard(tmp_path, monkeypatch):
    """Without heartbeats the guard would kill the run, although nothing is wrong with it."""
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    calls = []

    def sign():
        calls.append(1)
        if len(calls) > 2:
            raise OSError

    with watched(tmp_path, sign, action="exit") as dog:
        beside = dog._guard
        until = time.monotonic() + 20
        while len(calls) < 3 and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(0.2)
        assert beside.poll() == 0
        assert dog._guard is None


def test_a_suspended_guard_is_killed_when_the_watchdog_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, "_GOODBYE", 0.5)
    with watched(tmp_path, action="exit") as dog:
        beside = dog._guard
        beside.send_signal(signal.SIGSTOP)
    assert beside.poll() == -signal.SIGKILL


def test_the_watchdog_uses_no_alarm_signals(tmp_path):
    """Judges may use signal.alarm for their own time limits."""
    rung, former = [], signal.signal(signal.SIGALRM, lambda *_: rung.append(time.monotonic()))
    try:
        with watched(tmp_path, action="exit") as dog:
            signal.setitimer(signal.ITIMER_REAL, 0.5)
            until = time.monotonic() + 10
            while not rung and time.monotonic() < until:
                dog.step()
                time.sleep(0.05)
    finally:
        signal.signal(signal.SIGALRM, former)
    assert len(rung) == 1


def test_the_limit_is_above_the_time_limit_of_a_call(tmp_path):
    assert Watchdog(WatchdogConfig(), tmp_path, [], print, longest_call=7200.0).limit == 9000.0
    assert Watchdog(WatchdogConfig(), tmp_path, [], print, longest_call=60.0).limit == 1800.0
    assert Watchdog(WatchdogConfig(), tmp_path, [], print).limit == 1800.0


GOES_ON = """
import sys, time
from pathlib import Path
from jax_rlhf.runtime import watchdog
watchdog._MARGIN = 1.0
config = watchdog.WatchdogConfig(minutes=0.02, factor=1.0)
with watchdog.Watchdog(config, Path(sys.argv[1]), [lambda: 0], print) as dog:
    for step in range(4):
        dog.step()
        print(step, flush=True)
        for _ in range(5):  # so that the next step does not come at once where it goes on
            time.sleep(0.1)
print("done")
"""


@pytest.mark.parametrize("both", [True, False])
def test_a_process_that_was_suspended_continues(tmp_path, both):
    """Ctrl-Z, a suspended job or a debugger may stop it for longer than the time limit. That is not a stall."""
    command = [sys.executable, "-c", GOES_ON, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout.readline() == "0\n"
        stop = (lambda number: os.killpg(process.pid, number)) if both else process.send_signal
        stop(signal.SIGSTOP)
        time.sleep(5.0)
        stop(signal.SIGCONT)
        rest = process.stdout.read()
    assert process.returncode == 0
    assert rest.endswith("done\n")
    assert not (tmp_path / "stacks.txt").exists()


BEATS_LATE = """
import subprocess, sys, time
from jax_rlhf.runtime import guard
with subprocess.Popen([sys.executable, guard.__file__, "30"], stdin=subprocess.PIPE) as beside:
    beside.stdin.write(b"0.1\\n")
    beside.stdin.flush()
    time.sleep(1.5)
sys.exit(beside.returncode)
"""


def test_the_guard_accepts_a_heartbeat_that_is_late_by_less_than_a_margin():
    """If both processes were suspended, the guard may resume first."""
    done = subprocess.run([sys.executable, "-c", BEATS_LATE], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("wrong", [{"minutes": 0}, {"factor": 0.5}, {"minutes": -1}])
def test_wrong_settings_are_errors(wrong):
    with pytest.raises(ValueError, match=r"config.watchdog.factor=.* must be 1 or more"):
        WatchdogConfig(**wrong)


HANGS = """
import ctypes, sys, time
from pathlib import Path
from jax_rlhf.runtime import watchdog
watchdog._MARGIN = 0.5
config = watchdog.WatchdogConfig(minutes=0.01)
with watchdog.Watchdog(config, Path(sys.argv[1]), [lambda: 0], print):
    time.sleep(0.2)
    if sys.argv[2] == "python":
        time.sleep(60)
    ctypes.PyDLL(None).sleep(60)  # holds the interpreter's lock
"""


@pytest.mark.parametrize(("where", "code"), [("python", 75), ("c", -signal.SIGABRT)])
def test_a_process_that_hangs_is_killed_with_its_stacks_written(tmp_path, where, code):
    """The thread ends it, or the guard if no thread can run. Launch scripts restart the run after both exit codes."""
    done = subprocess.run(
        [sys.executable, "-c", HANGS, str(tmp_path), where], cwd=ROOT, capture_output=True, text=True, timeout=50
    )
    assert done.returncode == code
    stacks = (tmp_path / "stacks.txt").read_text() if where == "python" else done.stderr
    assert "File " in stacks
    assert "in <module>" in stacks


def test_a_run_whose_reward_function_hangs_is_ended(tmp_path):
    tiny.config(tmp_path)
    flags = ["--config.phases=ppo", f"--config.sft_model_path={tmp_path / 'base'}", "--config.checkpoint.every=1"]
    hangs = ["--config.ppo.reward.functions=tests.rewards.judges:hangs", "--config.ppo.reward.timeout=None"]
    code, _, errors = alone.run(tmp_path, *flags, *hangs, "--config.watchdog.minutes=0.1", "--config.ppo.eval_every=0")
    assert code == 75, errors[-3000:]
    assert "judges.py" in (tmp_path / "run" / "ppo" / "stacks.txt").read_text()
