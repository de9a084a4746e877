"""After a failed I/O call a run ends with an error message, and its continuation gives the same results bit for bit."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.cli import test_end_to_end as alone
from tests.processes import ROOT

FIRST, STEP = 423, 800  # two of about 1,700 calls, each with two of the four errors
LONG = int(os.environ.get("FAULT_FIRST", "1")), int(os.environ.get("FAULT_STEP", "1"))


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("the shim that makes I/O calls fail needs a C compiler, and Linux")
    library = tmp_path_factory.mktemp("shim") / "faulty.so"
    source = ROOT / "tests" / "hostile" / "faulty.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    return library


@pytest.mark.parametrize(("first", "step"), [(FIRST, STEP), pytest.param(*LONG, marks=pytest.mark.slow)])
def test_a_failed_io_call_ends_the_run_with_an_error_and_loses_nothing(tmp_path, shim, first, step):
    """A slow run tests all calls in hours. FAULT_FIRST=3 FAULT_STEP=10 tests the third and every tenth after it."""
    command = [sys.executable, "-m", "tests.hostile.io_faults", str(tmp_path), str(first), str(step)]
    environment = alone.environment() | {"LD_PRELOAD": str(shim)}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    trials = []
    for line in process.stdout:
        if line.startswith("{"):
            trials.append(json.loads(line))
            print(line, end="", flush=True)
    assert process.wait() == 0
    calls = trials.pop(0)["calls"]
    assert calls > 1000
    assert len(trials) == 2 * len(range(first, calls + 1, step))
    wrong = [one for one in trials if one["code"] not in (0, 1) or one["again"] != 0 or one["differs"]]
    assert wrong == []
    assert all(one["said"].startswith("error: ") and str(tmp_path) in one["said"] for one in trials if one["code"] == 1)
    assert sum(one["code"] for one in trials) > len(trials) / 4  # the shim makes calls fail
