"""benchmarks/on_device.py on a CPU: every part runs, and a failed part is reported without stopping the others."""

import json
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from benchmarks import on_device
from benchmarks.device import decode, flash, numbers, runs
from benchmarks.device.decode import step_bytes
from benchmarks.device.ppo import phase_flops
from jax_rlhf.cli.packaged import packaged_config
from jax_rlhf.config import run_config
from jax_rlhf.parallel import create_layout
from jax_rlhf.plan.all_programs import programs_of
from jax_rlhf.plan.shapes import model_shape
from tests.cli.test_end_to_end import environment
from tests.processes import ROOT

SLOW_PARTS = ("resume", "offload", "decode_captured")
"""Other tests check resuming and offloading without the script. On a CPU `decode_captured` equals `decode`."""


def run(*flags, **variables):
    """The exit code, and the rows of the output."""
    command = [sys.executable, "-m", "benchmarks.on_device", "--tiny", *flags]
    # As on a GPU, torch can be imported, which scikit-learn needs.
    env = environment() | {"PYTHONPATH": str(ROOT)} | variables
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900, check=False)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def test_every_part_runs():
    parts = [part for part in on_device.LIMITS if part not in SLOW_PARTS]
    code, rows = run(f"--parts={','.join(parts)}", "--budget=900")
    ended = {row["part"]: row["ended"] for row in rows if "ended" in row}
    assert ended == dict.fromkeys(parts, 0)
    checked = {row["part"] for row in rows if "ok" in row}
    assert checked == {"env", "numbers", "flash", "ppo", "quickstart"}
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


@pytest.mark.slow
@pytest.mark.parametrize("part", SLOW_PARTS)
def test_a_slow_part_runs(part):
    code, rows = run(f"--parts={part}")
    assert code == 0
    assert rows[-1]["failed"] == []
    assert len([row for row in rows if row["part"] == part]) > 1
    assert all(row.get("ok", True) for row in rows)


def test_a_part_that_crashes_is_reported_and_the_next_part_runs():
    code, rows = run("--parts=numbers,env", JAX_PLATFORMS="cpu", JAX_RAISE_PERSISTENT_CACHE_ERRORS="not a bool")
    ended = {row["part"]: row["ended"] for row in rows if "ended" in row}
    assert ended == {"numbers": 1, "env": 1}
    assert rows[-1]["failed"] == ["numbers: 1", "env: 1"]
    assert code == 1


def test_a_part_that_hangs_ends_at_its_time_limit(capsys):
    assert on_device.run_part("env", 0.1, tiny=True) == ["env: time limit"]
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["ended"] == "time limit"
    assert row["seconds"] < 5


def test_a_part_is_not_run_if_no_time_is_left():
    code, rows = run("--parts=numbers", "--budget=1")
    assert rows[0]["ended"] == "not run: no time was left"
    assert rows[-1]["failed"] == ["numbers: not run"]
    assert code == 1


def test_a_failed_check_is_named_with_its_case():
    line = json.dumps({"part": "flash", "ok": False, "case": [128, 4]})
    assert on_device._failures("flash", line) == ["flash [128, 4]"]
    assert on_device._failures("flash", json.dumps({"part": "flash", "ok": True})) == []
    assert on_device._failures("flash", "a warning of some library") == []


def test_an_error_in_a_case_fails_its_check_and_the_next_case_runs(monkeypatch, capsys):
    monkeypatch.setattr(flash, "flash_attend", None)  # it is not called on a CPU
    monkeypatch.setattr(flash, "TINY_CASES", ((128, 4, 3, 64, None, False), (128, 2, 2, 64, None, False)))
    monkeypatch.setattr(flash, "_time", lambda *arguments: None)
    flash.flash(True)
    broken, whole = map(json.loads, capsys.readouterr().out.splitlines())
    assert (broken["ok"], whole["ok"]) == (False, True)
    assert "num_kv_heads=3" in broken["error"]


def test_wrong_attention_fails_its_check(monkeypatch, capsys):
    monkeypatch.setattr(flash, "TINY_CASES", ((128, 2, 2, 64, None, False),))
    monkeypatch.setattr(flash, "_time", lambda *arguments: None)
    plain = flash.attend

    def wrong(query, key, value, allowed, **options):  # in 16 bits each key is a sixteenth too small
        key = key if key.dtype == jnp.float32 else key * 15 / 16
        return plain(query, key.astype(query.dtype), value, allowed, **options)

    monkeypatch.setattr(flash, "attend", wrong)
    flash.flash(True)
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_a_device_that_computes_wrong_logprobs_fails_its_check(monkeypatch, capsys):
    """Only the scanned model, which stands for the device, is changed."""
    exact = numbers._scored

    def scored(device, dtype, params, rows, *, unrolled):
        found = exact(device, dtype, params, rows, unrolled=unrolled)
        return found if unrolled else found | {"logprobs": found["logprobs"] * 1.001}

    monkeypatch.setattr(numbers, "_scored", scored)
    monkeypatch.setattr(numbers, "_other_tokens", lambda device, judge, dtype, params, rows: 0)
    numbers.numbers(True)
    rows = {row["dtype"]: row for row in map(json.loads, capsys.readouterr().out.splitlines()) if "ok" in row}
    assert rows["float32"]["ok"] is False
    assert rows["float32"]["gradient"] < 1e-4
    assert rows["bfloat16"]["ok"] is True  # the change is within the rounding of bfloat16


def test_unmet_requirements_are_named():
    lines = [
        "# a comment",
        "",
        "jax>=0.1",
        "numpy>=999  # why",
        "no-such-package-of-ours>=1",
        "torch; python_version<'3'",
    ]
    unmet = numbers.unmet_requirements(lines)
    assert list(unmet) == ["numpy>=999", "no-such-package-of-ours>=1"]
    assert unmet["no-such-package-of-ours>=1"] is None


def test_measured_peaks_are_compared_with_the_highest_planned_peak_so_far():
    gib = 2**30
    programs = {"a": (4.0, 4.1), "b": (3.0, 3.2), "c": (8.0, 9.0), "d": (9.0, None)}
    measured = {
        name: {"peak": peak * gib, "measured": None if found is None else found * gib}
        for name, (peak, found) in programs.items()
    }
    described = {name: {"peak": peak * gib} for name, peak in (("a", 4.0), ("b", 2.0), ("c", 8.5), ("d", 9.0))}
    rows = {row["program"]: row for row in runs.compared_peaks(measured, described)}
    assert list(rows) == ["b", "a", "c", "d"]
    assert {name: row["ok"] for name, row in rows.items()} == {"b": False, "a": True, "c": False, "d": False}
    assert rows["a"]["measured_over_planned"] == pytest.approx(4.1 / 4)
    assert rows["b"]["measured_over_described"] == pytest.approx(1.6)
    assert all(row["ok"] for row in runs.compared_peaks({"a": measured["a"]}, {}))


def test_the_settings_of_the_memory_benchmark_are_valid():
    config = packaged_config("llama3_8b")
    with config.unlocked():
        config.update_from_flattened_dict(runs.MEMORY_RUN | {"model.path": "smollm2-135m"})
    settings = run_config(config)
    layout = create_layout(settings.mesh, settings.rollout_mesh, jax.devices()[:1])
    names = {f"{program.phase} {program.name}" for program in programs_of(settings, layout)}
    assert {"sft step", "reward step", "ppo rollout", "ppo scoring", "ppo update"} <= names


def test_missed_bars_of_the_quickstart_are_named():
    ppo = {"eval/positive_before": 0.5, "eval/positive": 0.8, "eval/kl": 5.0, "eval/length": 15.0}
    ppo |= {"eval/distinct_1_before": 0.3, "eval/distinct_1": 0.24, "eval/distinct_responses": 1.0}
    summaries = {"sft": {"eval/loss": 4.37}, "reward": {"eval/auc": 0.845}, "ppo": ppo}
    line = {"val/ratio": 1.01, "policy/clipfrac_avg": 0.1, "policy/approxkl_avg": 0.01}
    found = runs.quickstart_figures(summaries, [{"eval/kl": 0.0}, line, line | {"val/ratio": 1.2}])
    assert found["positive_gain"] == pytest.approx(0.3)
    assert found["distinct_1_share"] == pytest.approx(0.8)
    assert runs.missed_bars(found) == ["highest_ratio"]
    assert runs.missed_bars(found | {"highest_ratio": 1.0, "auc": float("nan")}) == ["auc"]


def test_device_time_is_summed_by_kernel():
    def line(name, **spent):
        events = [SimpleNamespace(name=kernel, duration_ns=time) for kernel, time in spent.items()]
        return SimpleNamespace(name=name, events=events)

    gpu = SimpleNamespace(
        name="/device:GPU:0",
        lines=[line("Stream #1", gemm=5, copy=1), line("Stream #2", gemm=2), line("XLA Ops", dot=7)],
    )
    host = SimpleNamespace(name="/host:CPU", lines=[line("Stream", python=100)])
    assert decode.device_time(SimpleNamespace(planes=[gpu, host])) == {"gemm": 7, "copy": 1}
    tpu = SimpleNamespace(name="/device:TPU:0", lines=[line("Steps", step=9), line("XLA Ops", dot=7)])
    assert decode.device_time(SimpleNamespace(planes=[tpu])) == {"dot": 7}


def test_an_unknown_part_is_an_error():
    command = [sys.executable, "-m", "benchmarks.on_device", "--parts=speed"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--parts: speed; there are env, numbers" in done.stderr


def test_a_decoding_step_reads_the_kernels_and_the_filled_cache():
    config = model_shape("smollm2-135m")[0].replace(dtype=jnp.dtype("bfloat16"))
    kernels = 1000
    slot = 2 * 30 * 4 * 3 * 64 * 2  # (keys and values) × layers × rows × heads × width × bytes
    filled = sum(128 + index for index in range(1, 256)) / 255  # of steps 1 to R − 1
    assert step_bytes(config, kernels, 4, 128, 256) == pytest.approx(kernels + slot * filled)


def test_the_flops_of_an_iteration_match_its_matrix_products():
    """2 FLOPs per parameter and token forward, 6 with the backward pass. The tolerance covers attention."""
    rows, prompt, new = 4, 64, 64
    found = phase_flops("opt-125m", "opt-125m", rows, prompt, new)
    layers, tokens = 12 * (4 * 768**2 + 2 * 768 * 3072), rows * (prompt + new)
    head = 50_272 * 768 * rows * new
    assert found["score"] == pytest.approx(2 * (4 * layers * tokens + 2 * head), rel=0.1)
    assert found["train"] == pytest.approx(6 * (2 * layers * tokens + head), rel=0.1)
    assert found["generate"] == pytest.approx(2 * layers * tokens + 2 * head, rel=0.1)
