"""launch/slurm.sbatch with a fake srun, which runs two tasks, and a fake scontrol."""

import re
import shutil

import pytest

from tests.processes import ROOT

JOB = "--config=configs/sft.py", "--workdir=runs/it's $x"


def submit(world, *arguments, expect=0, **environment):
    """Runs a copy of the script in another folder, as slurmd does."""
    shutil.copy(world.checkout / "launch" / "slurm.sbatch", world.folder / "slurm_script")
    slurm = {"SLURM_SUBMIT_DIR": str(world.checkout), "SLURM_JOB_ID": "42", "SLURM_CPUS_PER_TASK": "8"}
    return world.run("../../slurm_script", *arguments, expect=expect, **(slurm | environment))


def test_every_task_runs_the_arguments_in_the_environment_of_gpu_sh(world):
    world.run("gpu.sh", "--install-only")
    submit(world, *JOB)
    (call,) = world.calls("srun")
    assert call["arguments"][0] == "--kill-on-bad-exit=0"
    assert call["arguments"][1].endswith("/bin/python")
    assert world.runs(0) == world.runs(1) == [list(JOB)]
    assert not world.calls("scontrol")


def test_a_missing_environment_is_an_error_that_says_how_to_make_it(world):
    assert "gpu.sh --install-only first" in submit(world, *JOB, expect=1).stderr
    assert not world.calls("srun")


def python_of(world):
    return world.calls("srun")[-1]["arguments"][1].removesuffix("/bin/python")


def test_the_driver_of_the_node_determines_the_environment(world):
    world.run("gpu.sh", "--install-only", "--cuda=13")
    world.set(driver="550.54.14")
    assert "nothing is installed in .venv/cuda12-3.11" in submit(world, *JOB, expect=1).stderr
    assert not world.calls("srun")
    world.run("gpu.sh", "--install-only", "--cuda=12")
    submit(world, *JOB)
    assert python_of(world) == ".venv/cuda12-3.11"
    world.set(driver="580.65.06")
    submit(world, *JOB)
    assert python_of(world) == ".venv/cuda13-3.11"
    world.set(gpus=0)  # the first node has no driver
    submit(world, *JOB)
    assert python_of(world) == ".venv/cuda13-3.11"


def test_every_task_caches_compiled_programs_in_the_workdir(world):
    world.run("gpu.sh", "--install-only")
    submit(world, *JOB)
    kept = [call.get("JAX_COMPILATION_CACHE_DIR") for call in world.calls("-m", "jax_rlhf") if "worker" in call]
    assert kept == ["runs/it's $x/compile_cache"] * 2


def test_a_job_submitted_from_another_folder_is_an_error(world):
    errors = submit(world, *JOB, expect=1, SLURM_SUBMIT_DIR=str(world.folder)).stderr
    assert "not called in the root of the repository" in errors


def test_exit_code_75_requeues_the_job_a_bounded_number_of_times(world):
    world.run("gpu.sh", "--install-only")
    world.set(**{"exit codes": {str(task): [75] * 9 for task in range(2)}})
    submit(world, *JOB, expect=75)
    assert [call["arguments"] for call in world.calls("scontrol")] == [["requeue", "42"]]
    submit(world, *JOB, expect=75, SLURM_RESTART_COUNT="9")
    assert len(world.calls("scontrol")) == 2
    assert "MAX_RESTARTS=10 is used up" in submit(world, *JOB, expect=75, SLURM_RESTART_COUNT="10").stderr
    submit(world, *JOB, expect=75, SLURM_RESTART_COUNT="1", MAX_RESTARTS="1")
    assert len(world.calls("scontrol")) == 2


def test_a_crash_requeues_the_job_only_while_the_run_advances(world):
    world.run("gpu.sh", "--install-only")
    world.set(**{"exit codes": {"0": [70] * 9, "1": [139] * 9}})
    submit(world, *JOB, expect=139)
    submit(world, *JOB, expect=139, SLURM_RESTART_COUNT="1")
    assert len(world.calls("scontrol")) == 2
    world.set(progress=["sft 7", "sft 3", "sft 7"])
    for count in range(2, 5):
        assert "not again" not in submit(world, *JOB, expect=139, SLURM_RESTART_COUNT=str(count)).stderr
    errors = submit(world, *JOB, expect=139, SLURM_RESTART_COUNT="5").stderr
    assert "started 3 times without getting further than sft 7; not again" in errors
    assert len(world.calls("scontrol")) == 5
    assert not list(world.checkout.glob("slurm-42.*"))  # the script deleted its notes


@pytest.mark.parametrize("code", [1, 2])
def test_a_user_error_is_passed_on_without_a_requeue(world, code):
    world.run("gpu.sh", "--install-only")
    world.set(**{"exit codes": {"1": [code]}})
    submit(world, *JOB, expect=code)
    assert not world.calls("scontrol")


def test_the_header_requests_a_task_per_gpu_and_time_to_save():
    script = (ROOT / "launch" / "slurm.sbatch").read_text()
    header, _ = script.split("set -euo pipefail")
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", header, flags=re.MULTILINE))
    assert script.count("#SBATCH") == len(options)  # Slurm ignores options after the first command
    assert options["gpus-per-node"] == options["ntasks-per-node"]
    assert options["signal"] == "TERM@300"
    assert {"requeue", "nodes", "time", "output"} <= set(options)
