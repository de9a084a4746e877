"""`python -m jax_rlhf.plan` on the command line."""

import json
import subprocess
import sys

import pytest

from jax_rlhf.plan.chips import CHIPS
from tests.cli.test_end_to_end import environment
from tests.plan import tiny

CONFIG = """
from pathlib import Path
from tests.plan import tiny
def get_config():
    return tiny.config(Path({folder!r}))
"""


def plan(folder, *flags):
    """Exit code, stdout, stderr."""
    (folder / "config.py").write_text(CONFIG.format(folder=str(folder)))
    command = [sys.executable, "-m", "jax_rlhf.plan", f"--config={folder / 'config.py'}", *flags]
    left_out = "JAX_PLATFORMS", "JAX_DISABLE_MOST_OPTIMIZATIONS"
    variables = {name: value for name, value in environment().items() if name not in left_out}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, done.stdout, done.stderr


def test_a_plan_reports_the_programs_of_all_phases(tmp_path):
    tiny.topology("h100:8")
    code, printed, errors = plan(tmp_path, "--topology=h100:8", "--json")
    assert code == 0, errors[-3000:]
    made = json.loads(printed)
    rows = {f"{row['phase']} {row['name']}": row for row in made["programs"]}
    phases = {
        "sft": ["step", "evaluation", "responses", "export"],
        "reward": ["step", "evaluation", "responses", "response scores", "export"],
        "ppo": ["rollout", "scoring", "update", "export"],
    }
    assert list(rows) == [f"{phase} {name}" for phase, names in phases.items() for name in names]
    assert (made["devices"], made["chip"]) == (8, "NVIDIA H100 SXM")
    for row in rows.values():
        parts = ("parameters", "optimizer", "batch", "temporaries")
        assert row["peak"] == pytest.approx(sum(row[part] for part in parts))
        assert row["fits"]
        assert row["memory"] == CHIPS["h100"].memory
        assert (row["flops"] > 0) == (row["name"] != "export")
        assert row["seconds"]["products"] == pytest.approx(row["flops"] / CHIPS["h100"].flops)
    kernels = 2 * (4 * 1024**2 + 3 * 1024 * 2048)
    actor, critic = kernels + 2 * 8192 * 1024, kernels + 8192 * 1024
    # Master weights and moments are float32, the reference and the reward model bfloat16. A device has an eighth.
    assert rows["ppo update"]["optimizer"] == pytest.approx((actor + critic) * 8 / 8, rel=0.01)
    assert rows["ppo update"]["parameters"] == pytest.approx((actor + critic) * (4 + 2) / 8, rel=0.01)
    # 6 FLOPs per parameter and token, 8 with remat, plus attention. The embedding table is a lookup without FLOPs.
    tokens = 32 * 256
    per_token = rows["sft step"]["flops"] * 8 / tokens / (kernels + 8192 * 1024)
    assert 7.5 < per_token < 8.6
    assert rows["ppo update"]["collectives"]["all-gather"]["bytes"] > 0
    # The largest tensor is gathered on each device, in the dtype in which it is saved.
    assert rows["ppo export"]["collectives"]["all-gather"]["bytes"] == 8192 * 1024 * 2 * 7 / 8
    assert rows["ppo export"]["temporaries"] >= 8192 * 1024 * 2
    # Scores are normalised on the policy's responses, so the policy is on the devices too, in bfloat16.
    more = rows["reward responses"]["parameters"] - rows["reward step"]["parameters"]
    assert more == pytest.approx(actor * 2 / 8, rel=0.01)
    assert rows["sft responses"]["traffic"] > 0
    hosts = {row["phase"]: row for row in made["hosts"]}
    assert [row["devices"] for row in hosts.values()] == [8] * 3
    assert hosts["ppo"]["checkpoint"] == pytest.approx((actor + critic) * (4 + 8), rel=0.01)
    assert hosts["ppo"]["file"] == pytest.approx((actor + critic) * 4, rel=0.01)
    assert hosts["ppo"]["memory"] == 1872e9
    assert made["notes"] == []


def test_a_plan_that_does_not_fit_suggests_a_setting_that_would(tmp_path):
    tiny.topology("h100:2")
    # Master weights and moments fit, but not together with the whole batch's activations, without remat.
    flags = (
        "--config.phases=sft",
        "--config.sft.sample_rows=0",
        "--config.data.sft_batch_size=2048",
        "--config.data.max_tokens=512",
        "--config.model.remat=none",
    )
    code, printed, errors = plan(tmp_path, "--topology=h100:2", *flags)
    assert code == 3, errors[-3000:]
    assert "NO, " in printed
    assert "--config.model.remat=full" in printed
    assert printed.rstrip().endswith("fits")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--topology is missing"),
        (("--topology=h100:8", "--config.model.path=someone/unknown-7b"), "or a preset"),
    ],
)
def test_invalid_input_is_an_error_without_a_traceback(flags, message, tmp_path):
    if flags and "h100" in flags[0]:
        tiny.topology("h100:8")
    code, printed, errors = plan(tmp_path, *flags)
    assert code == 1
    assert printed == ""
    assert message in errors
    assert "Traceback" not in errors


def test_programs_run_on_devices_that_report_their_memory(tmp_path, monkeypatch):
    """Every program runs on zeros, and its peak memory is measured. A fake device reports that memory."""
    import jax

    from jax_rlhf.parallel import create_layout
    from jax_rlhf.plan import measure
    from jax_rlhf.plan.all_programs import programs_of

    with pytest.raises(ValueError, match="do not report their memory"):
        measure.topology_here()

    class Device:
        device_kind = "TPU v5 lite"

        def memory_stats(self):
            return {"bytes_limit": 2**34, "peak_bytes_in_use": 12345}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    assert measure.topology_here().chip.memory == 2**34
    small = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 64}
    monkeypatch.setattr(tiny, "SHAPE", {**tiny.SHAPE, **small})
    flat = {"phases": ("ppo",), "data.max_prompt_tokens": 4, "data.max_tokens": 8, "ppo.sampling.max_new_tokens": 4}
    settings = tiny.settings(tmp_path, **flat)
    layout = create_layout(settings.mesh, settings.rollout_mesh, jax.devices())
    programs = programs_of(settings, layout)
    assert [measure.measured_peak(program) for program in programs] == [12345.0] * 4
