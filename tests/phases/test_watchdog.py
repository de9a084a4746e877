"""A run that stands still is noticed, one that only takes long is not."""

import signal
import subprocess
import sys
import threading
import time

import pytest

from jax_rlhf.phases.watchdog import Watchdog, WatchdogConfig
from tests.phases import test_end_to_end as alone
from tests.phases import tiny
from tests.processes import ROOT

SOON = 0.01  # minutes


def watched(folder, sign=lambda: 0, said=None, **how):
    config = WatchdogConfig(**{"minutes": SOON, "factor": 5.0, "action": "warn"} | how)
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
    assert "nothing was done for 1 seconds" in said[0].replace("for 0 ", "for 1 ")
    assert len(said) >= 2  # it is said again
    stacks = (tmp_path / "stacks.txt").read_text()
    assert "waits_for_ever" in stacks
    assert "test_where_nothing_is_done" in stacks


def test_steps_signs_and_growing_files_are_life(tmp_path):
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


def test_a_slow_run_has_more_time(tmp_path):
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


def test_it_ends_with_the_phase(tmp_path):
    said = []
    before = threading.active_count()
    with pytest.raises(KeyError), watched(tmp_path, said=said) as dog:
        raise KeyError
    assert threading.active_count() == before
    with dog:  # once more
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    with watched(tmp_path, said=said, action="off"):
        assert threading.active_count() == before
        time.sleep(1.0)
    assert said == []


def test_one_that_fails_leaves_no_alarm(tmp_path, monkeypatch):
    """The kernel's would end the process, though nothing is wrong with it."""
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    calls = []

    def sign():
        calls.append(1)
        if len(calls) > 2:
            raise OSError

    with watched(tmp_path, sign, action="exit"):
        until = time.monotonic() + 20
        while len(calls) < 3 and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(0.2)
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize("wrong", [{"minutes": 0}, {"factor": 0.5}, {"minutes": -1}])
def test_a_wrong_setting_is_said(wrong):
    with pytest.raises(ValueError, match=r"config.watchdog.factor=.* must be 1 or more"):
        WatchdogConfig(**wrong)


HANGS = """
import ctypes, sys, time
from pathlib import Path
from jax_rlhf.phases import watchdog
watchdog._MARGIN = 0.5
config = watchdog.WatchdogConfig(minutes=0.01)
with watchdog.Watchdog(config, Path(sys.argv[1]), [lambda: 0], print):
    time.sleep(0.2)
    if sys.argv[2] == "python":
        time.sleep(60)
    ctypes.PyDLL(None).sleep(60)  # holds the interpreter's lock
"""


@pytest.mark.parametrize(("where", "code"), [("python", 75), ("c", -signal.SIGALRM)])
def test_a_process_that_hangs_is_ended(tmp_path, where, code):
    """By the thread, or where that cannot run, by the kernel: launch scripts start again after both."""
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
    hangs = ["--config.ppo.reward_functions=tests.rewards.judges:hangs", "--config.ppo.reward_timeout=None"]
    code, _, errors = alone.run(tmp_path, *flags, *hangs, "--config.watchdog.minutes=0.1", "--config.ppo.eval_every=0")
    assert code == 75, errors[-3000:]
    assert "judges.py" in (tmp_path / "run" / "ppo" / "stacks.txt").read_text()
