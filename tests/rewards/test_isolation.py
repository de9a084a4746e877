"""A reward function in a process of its own: what it does there is a failure of its call, and of nothing else."""

import datetime
import decimal
import gc
import os
import time
from pathlib import Path

import numpy as np
import pytest

from jax_rlhf.rewards import Failures, OnFailure, RewardError, RewardFunction, score_texts
from jax_rlhf.rewards.worker import decode, encode
from tests.rewards import judges

PROMPTS, RESPONSES = ["one", "two", "three"], ["a", "bb", "ccc"]


def isolated(function, **how):
    return RewardFunction(function, isolation="process", **{"timeout": 30.0} | how)


def scored(function, columns=None, **more):
    return score_texts([function], PROMPTS, RESPONSES, columns or {}, **more).tolist()


def test_it_is_called_as_in_this_process():
    columns = {"bonus": [10, 20, 30]}
    assert scored(isolated(judges.lengths)) == scored(RewardFunction(judges.lengths)) == [1.0, 2.0, 3.0]
    assert scored(isolated("tests.rewards.judges:lengths"), columns) == [11.0, 22.0, 33.0]
    assert scored(isolated(judges.slowly)) == [2.0] * 3
    values = {
        "when": [datetime.datetime(2026, 1, 2, 3)] * 3,
        "data": [b"\xff"] * 3,
        "price": [decimal.Decimal("1.5")] * 3,
        "nested": [{"a": [1, {"b": None}]}] * 3,
    }
    assert (
        scored(isolated(judges.trl), values, chats=[[{"role": "user", "content": "x"}], None, None][:1] * 3)
        == [1.0] * 3
    )
    special = (PROMPTS, ["a <eos>", "bb", "ccc <eos>"])
    judge = isolated(judges.with_special)
    assert judge.asks_for_special_tokens()
    assert not isolated(judges.lengths).asks_for_special_tokens()
    assert scored(judge, with_special_tokens=special) == [1.0, 0.0, 1.0]
    assert scored(isolated(judges.some), unscored=7.0) == [7.0, 1.0, 1.0]


def test_its_process_stays_as_long_as_it_works():
    judge = isolated(judges.counts)
    assert [scored(judge)[0] for _ in range(3)] == [1.0, 2.0, 3.0]
    assert judges.CALLS == []


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (judges.exits, r"SystemExit: 0 .*judges.py, line"),
        (judges.exits_at_once, "its process ended with exit code 0"),
        (judges.crashes, "its process was ended by SIGSEGV"),
        (judges.kills_itself, "its process was ended by SIGKILL"),
        (judges.leaves_a_child, "its process ended with exit code 7"),
        (judges.closes, "ended with exit code|closed its socket"),
        (judges.raises, r"KeyError: '\\x1b\[31m' \(.*judges.py, line"),
        (judges.wrong, "returned a dict where a number is expected"),
        (judges.texts, "returned a str where a number is expected"),
        (judges.not_numbers, "returned nan for 3 of 3"),
        (judges.writes_into_its_socket, "something else was written to its socket"),
        ("tests.rewards.judges:nobody", "cannot be imported: AttributeError"),
        ("tests.rewards.nowhere:x", "cannot be imported: ModuleNotFoundError"),
        ("tests.rewards.judges:PROMPTS", "cannot be imported: AttributeError"),
    ],
)
def test_what_it_does_is_a_failure_of_its_call(function, message):
    judge, started = isolated(function), time.monotonic()
    with pytest.raises(RewardError, match=message):
        scored(judge)
    assert time.monotonic() - started < 25
    if isinstance(function, str):
        return
    count = Failures()
    how = OnFailure(retries=1, then="penalize", score=-2.0)
    assert scored(judge, on_failure=how, failures=count) == [-2.0] * 3  # it is started again, and fails again
    assert (count.failed_calls, count.penalized) == (2, 3)


def test_a_call_that_hangs_is_killed():
    judge, started = isolated(judges.hangs, timeout=4.0), time.monotonic()
    count = Failures()
    with pytest.raises(RewardError, match="it took too long"):
        scored(judge, failures=count)
    assert time.monotonic() - started < 15
    assert count.timeouts == 1
    assert judge._isolated._process is None


def test_memory_is_limited():
    with pytest.raises(RewardError, match="MemoryError"):
        scored(isolated(judges.takes_memory, memory_gb=2.0))


def test_forks_and_prints_harm_nothing(capfd):
    assert [scored(isolated(judges.forks)) for _ in range(2)] == [[3.0] * 3] * 2
    assert scored(isolated(judges.prints)) == [4.0] * 3
    until, seen = time.monotonic() + 10, ""
    while "from a shell" not in seen and time.monotonic() < until:
        seen += capfd.readouterr().err
        time.sleep(0.05)
    assert "red" in seen
    assert "\x1b" not in seen


def test_a_process_that_has_ended_is_not_ended_again(monkeypatch):
    """Its number may be another one's by then."""
    gc.collect()  # ends the processes of other tests
    judge, ended = isolated(judges.exits_at_once), []
    with pytest.raises(RewardError):
        scored(judge)
    monkeypatch.setattr(os, "killpg", lambda *call: ended.append(call))
    judge._isolated.close()
    del judge
    gc.collect()
    assert ended == []


def test_its_process_ends_with_it():
    judge = isolated(judges.lengths)
    scored(judge)
    process = judge._isolated._process
    assert process.poll() is None
    del judge
    gc.collect()
    assert process.poll() is not None


def test_it_has_no_devices_and_no_lock_of_the_run(tmp_path):
    judge = isolated("os:getppid")  # takes no arguments: fails, and its process lives
    with pytest.raises(RewardError, match="TypeError"):
        scored(judge)
    there = Path("/proc", str(judge._isolated._process.pid))
    assert "JAX_PLATFORMS=cpu" in (there / "environ").read_text()
    files = {os.readlink(file) for file in (there / "fd").iterdir()}
    assert {file.partition(":")[0] for file in files} <= {"/dev/null", "pipe", "socket"}


@pytest.mark.parametrize("function", [lambda prompts, responses: [1.0] * 3, np.array])
def test_what_cannot_be_imported_elsewhere_is_said(function):
    if function is np.array:
        with pytest.raises(ValueError, match='a name is for isolation="process"'):
            RewardFunction("numpy:array")
        return
    with pytest.raises(ValueError, match="put it into a module of its own"):
        isolated(function)


def test_a_column_that_cannot_be_passed_is_said():
    with pytest.raises(RewardError, match="a object cannot be passed to another process"):
        scored(isolated(judges.lengths), {"bonus": [object()] * 3})


def test_values_come_back_as_they_were():
    values = [
        None,
        True,
        1,
        1.5,
        "a\ud800",
        b"\x00",
        [1, [2]],
        {"a": {"b": [b"c"]}, 7: "\0"},
        ["\0", "x", "y"],
        ["", []],
    ]
    values += [datetime.datetime(2026, 1, 2), datetime.date(2026, 1, 2), datetime.time(3), datetime.timedelta(1, 2)]
    assert decode(encode(values)) == values
    assert decode(encode({"a": np.arange(3), "b": np.float32(1.5), "c": (1, 2)})) == {
        "a": [0, 1, 2],
        "b": 1.5,
        "c": [1, 2],
    }


@pytest.mark.parametrize("timeout", [None, 20.0])
def test_without_isolation_sys_exit_is_a_failure_too(timeout):
    with pytest.raises(RewardError, match="it ended with SystemExit"):
        scored(RewardFunction(judges.exits, timeout=timeout))
