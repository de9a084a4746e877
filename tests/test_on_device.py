"""benchmarks/on_device.py on a CPU: every part runs, and what fails is told and costs itself alone."""

import json
import subprocess
import sys

import jax.numpy as jnp
import pytest

from benchmarks import on_device
from benchmarks.device.decode import step_bytes
from benchmarks.device.ppo import phase_flops
from jax_rlhf.plan.shapes import model_shape
from tests.phases.test_end_to_end import environment
from tests.processes import ROOT


def run(*flags, **variables):
    """Exit code, rows."""
    command = [sys.executable, "-m", "benchmarks.on_device", "--tiny", *flags]
    # The whole package as it is on a card: torch too, which scikit-learn asks for.
    env = environment() | {"PYTHONPATH": str(ROOT)} | variables
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900, check=False)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def test_every_part_runs():
    code, rows = run("--budget=900")
    ended = {row["part"]: row["ended"] for row in rows if "ended" in row}
    assert ended == dict.fromkeys(on_device.LIMITS, 0)
    checked = {row["part"] for row in rows if "ok" in row}
    assert checked == {"env", "numbers", "flash", "ppo", "offload", "resume", "quickstart"}
    assert [row for row in rows if row.get("ok") is False] == []
    assert rows[-1]["failed"] == []
    assert code == 0
    assert [row["not_run"] for row in rows if row["part"] == "memory" and "not_run" in row] == [
        "cpu devices do not report their memory"
    ]
    layers = {row["layers"]: row for row in rows if row["part"] == "decode" and "layers" in row}
    assert [layers[name]["used_here"] for name in ("unrolled", "scanned")] == [True, False]
    (iteration,) = (row for row in rows if row["part"] == "ppo" and "metrics" in row)
    tokens = iteration["rows"] * sum(iteration["tokens"])
    assert iteration["tokens_per_second"] == pytest.approx(tokens / iteration["seconds"]["iteration"], rel=1e-3)


def test_a_part_that_breaks_is_told_and_the_next_one_runs():
    code, rows = run("--parts=numbers,env", JAX_PLATFORMS="cpu", JAX_RAISE_PERSISTENT_CACHE_ERRORS="not a bool")
    ended = {row["part"]: row["ended"] for row in rows if "ended" in row}
    assert ended == {"numbers": 1, "env": 1}
    assert rows[-1]["failed"] == ["numbers: 1", "env: 1"]
    assert code == 1


def test_a_part_that_hangs_ends_at_its_limit(capsys):
    assert on_device.run_part("env", 0.1, tiny=True) == ["env: time limit"]
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["ended"] == "time limit"
    assert row["seconds"] < 5


def test_a_part_without_time_is_not_run():
    code, rows = run("--parts=numbers", "--budget=1")
    assert rows[0]["ended"] == "not run: no time was left"
    assert rows[-1]["failed"] == ["numbers: not run"]
    assert code == 1


def test_a_check_that_fails_is_named():
    line = json.dumps({"part": "flash", "ok": False, "case": [128, 4]})
    assert on_device._failures("flash", line) == ["flash [128, 4]"]
    assert on_device._failures("flash", json.dumps({"part": "flash", "ok": True})) == []
    assert on_device._failures("flash", "a warning of some library") == []


def test_an_unknown_part_is_an_error():
    command = [sys.executable, "-m", "benchmarks.on_device", "--parts=speed"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--parts: speed; there are env, numbers" in done.stderr


def test_what_a_step_of_decoding_must_read():
    config = model_shape("smollm2-135m")[0].replace(dtype=jnp.dtype("bfloat16"))
    kernels = 1000
    slot = 2 * 30 * 4 * 3 * 64 * 2  # keys and values, layers, rows, heads, width, bytes
    filled = sum(128 + index for index in range(1, 256)) / 255  # of steps 1 to R − 1
    assert step_bytes(config, kernels, 4, 128, 256) == pytest.approx(kernels + slot * filled)


def test_flops_of_an_iteration_are_those_of_its_products():
    """2 FLOPs per parameter and token forward, 6 with the backward pass; attention is within the margin."""
    rows, prompt, new = 4, 64, 64
    found = phase_flops("opt-125m", "opt-125m", rows, prompt, new)
    layers, tokens = 12 * (4 * 768**2 + 2 * 768 * 3072), rows * (prompt + new)
    head = 50_272 * 768 * rows * new
    assert found["score"] == pytest.approx(2 * (4 * layers * tokens + 2 * head), rel=0.1)
    assert found["train"] == pytest.approx(6 * (2 * layers * tokens + head), rel=0.1)
    assert found["generate"] == pytest.approx(2 * layers * tokens + 2 * head, rel=0.1)
