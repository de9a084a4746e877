"""Reward functions in a separate process: a crash, an exit or a hang there only fails the call."""

import datetime
import decimal
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from jax_rlhf.io.import_function import import_function
from jax_rlhf.rewards import Failures, OnFailure, RewardError, RewardFunction, asks_for_special_tokens_of, score_texts
from jax_rlhf.rewards.worker import decode, encode
from jax_rlhf.runtime.workdir import lock_workdir
from tests.processes import ROOT
from tests.rewards import judges

PROMPTS, RESPONSES = ["one", "two", "three"], ["a", "bb", "ccc"]


def isolated(function, **options):
    return RewardFunction(function, isolation="process", **{"timeout": 30.0} | options)


def scored(function, columns=None, **more):
    return score_texts([function], PROMPTS, RESPONSES, columns or {}, **more).tolist()


def test_an_isolated_function_is_called_as_in_this_process():
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


def test_a_function_can_be_given_by_its_file(tmp_path, monkeypatch):
    (tmp_path / "weights.py").write_text("WEIGHT = 2.0\n")
    (tmp_path / "my_rewards.py").write_text(
        "from weights import WEIGHT\n\n\n"
        "def score(prompts, responses):\n    return [WEIGHT * len(text) for text in responses]\n"
    )
    assert scored(isolated(f"{tmp_path / 'my_rewards.py'}:score")) == [2.0, 4.0, 6.0]
    monkeypatch.chdir(tmp_path)
    relative = isolated("my_rewards.py:score")
    assert scored(relative) == [2.0, 4.0, 6.0]
    assert relative.title == "score"
    function = import_function(f"{tmp_path / 'my_rewards.py'}:score")  # its module is named by the file
    assert scored(isolated(function)) == [2.0, 4.0, 6.0]
    with pytest.raises(RewardError, match=r"cannot be imported: ImportError: there is no file other\.py"):
        scored(isolated("other.py:score"))


def test_the_process_is_reused_between_calls():
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
        (judges.wrong, "returned a dict instead of a number"),
        (judges.texts, "returned a str instead of a number"),
        (judges.not_numbers, "returned nan for 3 of 3"),
        (judges.writes_into_its_socket, "its socket contains data that is not an answer"),
        (judges.says_much, r"it answered with 4,000,\d{3} bytes, more than a number per response"),
        (judges.is_cancelled, "CancelledError"),
        (judges.has_no_words, "WithoutWords: .no message"),
        ("tests.rewards.greets:score", "its socket contains data that is not an answer"),
        ("tests.rewards.judges:nobody", "cannot be imported: AttributeError"),
        ("tests.rewards.nowhere:x", "cannot be imported: ModuleNotFoundError"),
        ("tests.rewards.judges:PROMPTS", "cannot be imported: AttributeError"),
    ],
)
def test_misbehaviour_in_the_process_only_fails_the_call(function, message):
    judge, started = isolated(function), time.monotonic()
    with pytest.raises(RewardError, match=message):
        scored(judge)
    assert time.monotonic() - started < 25
    if isinstance(function, str):
        return
    count = Failures()
    on_failure = OnFailure(retries=1, then="penalize", score=-2.0)
    assert scored(judge, on_failure=on_failure, failures=count) == [-2.0] * 3  # the restarted process fails again
    assert (count.failed_calls, count.penalized) == (2, 3)


def test_a_call_that_hangs_is_killed():
    judge, started = isolated(judges.hangs, timeout=4.0), time.monotonic()
    count = Failures()
    with pytest.raises(RewardError, match="it took too long"):
        scored(judge, failures=count)
    assert time.monotonic() - started < 15
    assert count.timeouts == 1
    assert judge._isolated._process is None


def test_the_memory_of_the_process_is_limited():
    with pytest.raises(RewardError, match="MemoryError"):
        scored(isolated(judges.takes_memory, memory_gb=2.0))


def test_forks_and_prints_do_not_corrupt_the_answers(capfd):
    judge = isolated(judges.forks)
    for _ in range(4):
        assert scored(judge) == [3.0] * 3
        time.sleep(0.1)
    assert scored(isolated(judges.prints)) == [4.0] * 3
    until, seen = time.monotonic() + 10, ""
    while "from a shell" not in seen and time.monotonic() < until:
        seen += capfd.readouterr().err
        time.sleep(0.05)
    assert "red" in seen
    assert "\x1b" not in seen


def test_a_process_that_has_exited_is_not_signalled(monkeypatch):
    """The operating system may have given its process id to another process."""
    gc.collect()  # ends the processes of other tests
    judge, ended = isolated(judges.exits_at_once), []
    with pytest.raises(RewardError):
        scored(judge)
    monkeypatch.setattr(subprocess.Popen, "send_signal", lambda *call: ended.append(call))
    judge._isolated.close()
    del judge
    gc.collect()
    assert ended == []


def gone(process):
    """Whether a process ends within 10 seconds."""
    until = time.monotonic() + 10
    while Path(f"/proc/{process}").exists() and time.monotonic() < until:
        time.sleep(0.05)
    return not Path(f"/proc/{process}").exists()


@pytest.mark.parametrize("how", ["closed", "killed"])
def test_processes_that_a_function_started_end_with_its_process(how):
    """A daemon in another process group ends too, even after its parent has exited."""
    judge = isolated(judges.leaves_a_daemon)
    daemon = int(scored(judge)[0])
    assert Path(f"/proc/{daemon}").exists()
    if how == "closed":
        judge._isolated.close()
    else:  # kill the process that calls the function, as the out-of-memory killer might
        (caller,) = children(judge._isolated._process.pid) - {daemon}
        os.kill(caller, signal.SIGKILL)
    assert gone(daemon)


def children(process):
    stats = {entry.name: (entry / "stat").read_text() for entry in Path("/proc").iterdir() if entry.name.isdigit()}
    return {int(name) for name, stat in stats.items() if int(stat.rpartition(")")[2].split()[1]) == process}


ENDS = """
import os, signal, sys
from jax_rlhf.rewards import RewardFunction
from tests.rewards import judges
judge = RewardFunction(judges.leaves_a_daemon, isolation="process", timeout=30.0)
print(int(judge(["a"], ["b"], {})[0]), judge._isolated._process.pid, flush=True)
if os.fork() == 0:
    os.read(0, 1)  # holds all that it has inherited
    os._exit(0)
os._exit(75) if sys.argv[1] == "exit" else os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("how", ["exit", "kill"])
def test_the_process_ends_with_the_run(how):
    """The run may exit or be killed. Its processes must not accumulate on a machine that restarts it."""
    command = [sys.executable, "-c", ENDS, how]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run:
        daemon, process = map(int, run.stdout.readline().split())
        run.wait(30)
        assert gone(daemon)
        assert gone(process)


def test_calls_from_threads_get_their_own_answers():
    """A process serves calls even after the thread that started it has ended."""
    judge, found = isolated(judges.waits), {}

    def call(number):
        found[number] = judge(["p"], [str(number)], {}).tolist()

    threads = [threading.Thread(target=call, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: [float(number)] for number in range(8)}
    counting, counted = isolated(judges.counts), []
    for _ in range(3):
        thread = threading.Thread(target=lambda: counted.append(counting(["p"], ["r"], {})[0]))
        thread.start()
        thread.join()
    assert counted == [1.0, 2.0, 3.0]


LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_AS, (2**37, 2**37))
from jax_rlhf.rewards import RewardFunction
from tests.rewards import judges
judge = RewardFunction(judges.lengths, isolation="process", memory_gb=1000.0)
print(judge(["a"], ["bb"], {}).tolist())
"""


def test_the_memory_limit_does_not_exceed_that_of_the_run():
    done = subprocess.run([sys.executable, "-c", LIMITED], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "[2.0]\n", done.stderr[-2000:]


def test_a_function_that_cannot_be_imported_only_fails_its_calls():
    """`asks_for_special_tokens_of` does not fail."""
    judge = isolated("tests.rewards.judges:nobody")
    assert not asks_for_special_tokens_of([judge])
    assert asks_for_special_tokens_of([judge, isolated(judges.with_special)])
    count = Failures()
    assert scored(judge, on_failure=OnFailure(0, "penalize", -2.0), failures=count) == [-2.0] * 3
    assert count.failed_calls == 1


@pytest.mark.parametrize("timeout", [None, 20.0])
@pytest.mark.parametrize(
    ("function", "said"), [(judges.is_cancelled, "Cancelled"), (judges.has_no_words, "no message")]
)
def test_without_isolation_unusual_exceptions_are_failures_too(timeout, function, said):
    with pytest.raises(RewardError, match=said):
        scored(RewardFunction(function, timeout=timeout))


def test_the_process_ends_with_its_reward_function():
    judge = isolated(judges.lengths)
    scored(judge)
    process = judge._isolated._process
    assert process.poll() is None
    del judge
    gc.collect()
    assert process.poll() is not None


def test_a_process_that_is_killed_between_two_calls_is_restarted():
    """The kernel may kill a process when memory runs out."""
    judge = isolated(judges.counts)
    assert scored(judge) == [1.0] * 3
    os.kill(judge._isolated._process.pid, signal.SIGKILL)
    judge._isolated._process.wait()
    assert scored(judge) == [1.0] * 3


def test_the_process_gets_neither_devices_nor_locks_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    judge = isolated("os:getppid")  # takes no arguments: the call fails, and the process stays alive
    with lock_workdir(tmp_path):
        with pytest.raises(RewardError, match="TypeError"):
            scored(judge)
        process = judge._isolated._process.pid
        for one in (process, *children(process)):
            there = Path("/proc", str(one))
            assert "JAX_PLATFORMS=cpu" in (there / "environ").read_text()
            files = {os.readlink(file) for file in (there / "fd").iterdir()}
            assert {file.partition(":")[0] for file in files} <= {"/dev/null", "pipe", "socket"}


@pytest.mark.parametrize("function", [lambda prompts, responses: [1.0] * 3, np.array])
def test_functions_that_cannot_be_imported_by_name_are_errors(function):
    if function is np.array:
        with pytest.raises(ValueError, match='a name is for isolation="process"'):
            RewardFunction("numpy:array")
        return
    with pytest.raises(ValueError, match="put it into a separate module"):
        isolated(function)


def test_a_column_that_cannot_be_serialised_is_an_error():
    with pytest.raises(RewardError, match="a object cannot be passed to another process"):
        scored(isolated(judges.lengths), {"bonus": [object()] * 3})


def test_decoding_an_encoded_value_gives_the_value():
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
