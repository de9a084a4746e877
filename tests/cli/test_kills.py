"""A run is killed at random moments and restarted. Its results equal those of a run that was never stopped."""

import json
import random
import re
import signal
import subprocess
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.cli import test_end_to_end as alone

PHASES = ("sft", "reward", "ppo")
TIMES = ("time", "second", "eps")
LONG = ("--config.sft.steps=60", "--config.reward.steps=60", "--config.ppo.iterations=250")


def start(folder, *flags):
    command = alone.command(folder, "--config.checkpoint.every=1", *flags, config=folder.parent / "config.py")
    return subprocess.Popen(
        command, cwd=folder.parent, env=alone.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def complete(workdir):
    """The step of each phase's last complete checkpoint, 0 if there is none."""
    found = {phase: (workdir / phase / "checkpoints").glob("*") for phase in PHASES}
    return {phase: max((int(f.name) for f in files if f.name.isdigit()), default=0) for phase, files in found.items()}


def without_times(file):
    rows = alone.lines(file)
    return [{k: v for k, v in row.items() if not any(word in k for word in TIMES)} for row in rows]


def assert_same(one, other):
    for phase in PHASES:
        for name in ("metrics.jsonl", "samples.jsonl"):
            assert without_times(one / phase / name) == without_times(other / phase / name), (phase, name)
        for model in ("model", "critic"):
            file = f"{phase}/{model}/model.safetensors"
            for name, tensor in load_file(one / file).items() if (one / file).exists() else ():
                np.testing.assert_array_equal(tensor, load_file(other / file)[name], err_msg=f"{file} {name}")


def run_with(number, kills, folder, seed, *flags):
    """Stops a run `kills` times and restarts it. Returns the number of logged steps that each stop lost."""
    longest = 8.0 if flags else 3.0  # seconds until the signal at most; the whole run takes much longer
    moments, lost, sent = random.Random(seed), [], 0
    known = dict.fromkeys(PHASES, 0)
    while True:
        process = start(folder, *flags)
        begun = process.stdout.readline()
        while begun and "checking settings" not in begun:
            begun = process.stdout.readline()
        if sent < kills:
            try:
                process.wait(moments.uniform(0.0, longest))
            except subprocess.TimeoutExpired:
                process.send_signal(number)
                sent += 1
        output = process.communicate(timeout=300)[0]
        gone_on = re.search(r"(\w+): continuing from the checkpoint of step (\d+)", output)
        if gone_on:  # it must continue from the last complete checkpoint
            assert known[gone_on[1]] == int(gone_on[2])
        # A phase with a checkpoint must not start from the beginning. This has to be checked here, because the results
        # would be the same.
        for phase, step in known.items():
            assert not step or f"{phase}: compiling" not in output or (gone_on and gone_on[1] == phase), output[-3000:]
        if process.returncode == 0:
            assert sent == kills, "it ended before it was killed often enough: make the run longer"
            return lost
        assert process.returncode == (-number if number == signal.SIGKILL else 75), output[-3000:]
        known = complete(folder / "run")
        at = next((phase for phase in PHASES if not (folder / "run" / phase / "summary.json").exists()), None)
        if at is not None and (folder / "run" / at / "metrics.jsonl").exists():
            written = [line["step"] for line in whole_lines(folder / "run" / at / "metrics.jsonl")]
            lost.append(max(written, default=0) - known[at])


def whole_lines(file):
    """The complete lines of a file, whose last line may be incomplete."""
    content = file.read_bytes()
    return [json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    (folder / "config.py").write_text(alone.CONFIG.format(folder=str(folder)))
    return folder


def straight(folder, *flags):
    folder.mkdir()
    output, _ = start(folder, *flags).communicate(timeout=300)
    assert "ppo: iterations" in output, output[-3000:]
    return folder / "run"


def compared(number, kills, folder, name, wanted, *flags):
    (folder / name).mkdir()
    lost = run_with(number, kills, folder / name, kills, *flags)
    assert_same(wanted, folder / name / "run")
    return lost


def test_a_killed_run_ends_with_the_results_of_an_uninterrupted_one(folder, whole):
    """The two runs have the same settings, except for the interval between checkpoints."""
    lost = compared(signal.SIGKILL, 2, folder, "killed", whole[0])
    assert max(lost, default=0) <= 2  # the current step, and the one whose checkpoint was being written


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_stopped_35_times_ends_with_the_same_results(folder, number):
    wanted = straight(folder / f"straight{number}", *LONG)
    started = time.time()
    lost = compared(number, 35, folder, f"killed{number}", wanted, *LONG)
    print(f"{number.name}: 35 times, {time.time() - started:.0f} s; steps lost each time: {lost}")
    assert max(lost, default=0) <= (2 if number == signal.SIGKILL else 0)
