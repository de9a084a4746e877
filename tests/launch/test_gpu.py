"""launch/gpu.sh with a fake nvidia-smi and interpreter."""

import os
import signal

import pytest

from tests.launch.fakes import wait_until

JOB = "--config=configs/sft.py", "--workdir=runs/it's $x"


def test_gpu_sh_installs_once_and_passes_its_arguments_on(world):
    world.run("gpu.sh", *JOB)
    world.run("gpu.sh", *JOB)
    assert len(world.calls("-m", "venv")) == 1
    assert len(world.calls("-m", "pip", "-e", ".[cuda13]")) == 1
    assert world.runs() == [list(JOB)] * 2
    assert {call["cwd"] for call in world.calls("-m", "jax_rlhf")} == {str(world.checkout)}


def test_gpu_sh_without_a_gpu_fails_and_installs_nothing(world):
    world.set(gpus=0)
    assert "there is no NVIDIA GPU here" in world.run("gpu.sh", *JOB, expect=1).stderr
    (world.folder / "bin" / "nvidia-smi").write_text("#!/bin/sh\nexit 127\n")
    world.run("gpu.sh", *JOB, expect=1)
    assert not world.calls("-m")


def test_install_only_makes_the_environment_without_a_gpu(world):
    world.set(gpus=0)
    output = world.run("gpu.sh", "--install-only")
    assert world.calls("-m", "pip", "-e", ".[cuda12]")
    assert not world.runs()
    assert "no driver to ask here: taking CUDA 12" in output.stderr
    world.run("gpu.sh", "--install-only", "--cuda=13")
    assert world.calls("-m", "pip", "-e", ".[cuda13]")


@pytest.mark.parametrize(
    ("driver", "capabilities", "cuda"),
    [
        ("580.65.06", ["9.0"], "13"),
        ("600.1", ["7.5"], "13"),
        ("1000.0", ["10.0"], "13"),
        ("579.99.99", ["9.0"], "12"),
        ("525.60.13", ["8.0"], "12"),
        ("580.65.06", ["7.0"], "12"),  # V100, which CUDA 13 does not support
        ("580.65.06", ["9.0", "7.0"], "12"),
    ],
)
def test_the_driver_and_the_gpus_determine_the_cuda_version(world, driver, capabilities, cuda):
    world.set(driver=driver, capabilities=capabilities)
    world.run("gpu.sh", *JOB)
    (call,) = world.calls("-m", "pip", "-e")
    assert call["arguments"][-1] == f".[cuda{cuda}]"
    assert world.calls("-m", "venv", f".venv/cuda{cuda}-3.11")  # the fake interpreter is Python 3.11
    assert world.runs() == [list(JOB)]


def test_an_old_driver_is_an_error_unless_cuda_is_chosen_explicitly(world):
    world.set(driver="470.82.01", capabilities=["8.0"])
    assert "the NVIDIA driver is too old: JAX needs 525" in world.run("gpu.sh", *JOB, expect=1).stderr
    assert not world.calls("-m")
    world.run("gpu.sh", "--cuda=12", *JOB)
    assert world.calls("-m", "pip", "-e", ".[cuda12]")
    assert "JAX has wheels for 12 and 13" in world.run("gpu.sh", "--cuda=11", *JOB, expect=2).stderr


def test_an_environment_is_cleared_after_a_failed_pip_install(world):
    world.set(**{"pip code": 1})
    world.run("gpu.sh", "--install-only", expect=1)
    world.set(**{"pip code": 0})
    world.run("gpu.sh", "--install-only")
    assert len(world.calls("-m", "venv", "--clear")) == 1
    assert len(world.calls("-m", "pip", "-e", ".[cuda13]")) == 2
    world.run("gpu.sh", *JOB)
    assert len(world.calls("-m", "venv")) == 2
    assert world.runs() == [list(JOB)]


def test_a_script_waits_while_another_one_installs_the_environment(world):
    world.set(**{"pip seconds": 0.5})
    first = world.start("gpu.sh", "--install-only")
    wait_until(lambda: world.calls("-m", "pip"))
    world.run("gpu.sh", *JOB)
    first.communicate(timeout=60)
    assert first.returncode == 0
    assert not world.calls("--clear")
    assert world.runs() == [list(JOB)]


def caches(world):
    return [(c["JAX_COMPILATION_CACHE_DIR"], c["XLA_CACHES"]) for c in world.calls("-m", "jax_rlhf")]


@pytest.mark.parametrize(
    ("arguments", "folder", "of_xla"),
    [
        (("--workdir=runs/it's $x",), "runs/it's $x/compile_cache", None),
        (("--workdir", "/a b/c/"), "/a b/c/compile_cache", None),
        (("-workdir=x", "--overwrite", "-workdir", "y"), "y/compile_cache", None),  # the last flag counts, as in absl
        (("--workdir=~/run",), "HOME/run/compile_cache", None),
        (("--workdir=gs://bucket/run",), "gs://bucket/run/compile_cache", "none"),
        (("--workdir=x", "--compile_cache="), None, None),
        (("--compile_cache", "y", "--workdir=x"), None, None),
        (("--help",), None, None),
        (("--workdir",), None, None),
    ],
)
def test_compiled_programs_are_cached_in_the_workdir(world, arguments, folder, of_xla):
    world.run("gpu.sh", "--config=configs/sft.py", *arguments)
    expected = folder and folder.replace("HOME", str(world.folder))
    assert caches(world) == [(expected, of_xla)]


@pytest.mark.parametrize("chosen", ["/fast/disk", ""])
def test_an_existing_compilation_cache_setting_is_kept(world, chosen):
    world.run("gpu.sh", "--workdir=x", JAX_COMPILATION_CACHE_DIR=chosen)
    assert caches(world) == [(chosen, None)]


def test_exit_code_75_restarts_the_run(world):
    world.set(**{"exit codes": {"0": [75, 75, 0]}})
    assert "restart 2 of at most 10" in world.run("gpu.sh", *JOB).stderr
    assert world.runs() == [list(JOB)] * 3


def test_the_number_of_restarts_is_bounded(world):
    world.set(**{"exit codes": {"0": [75] * 9}})
    world.run("gpu.sh", "--max-restarts=2", *JOB, expect=75)
    assert len(world.runs()) == 3
    world.run("gpu.sh", "--max-restarts=many", *JOB, expect=2)


@pytest.mark.parametrize("code", [70, 134, 137, 139])
def test_a_crash_restarts_the_run(world, code):
    world.set(**{"exit codes": {"0": [code, 75, code, 0]}})
    world.run("gpu.sh", *JOB)
    assert len(world.runs()) == 4


@pytest.mark.parametrize("code", [70, 75, 137])
def test_a_run_that_does_not_advance_is_not_restarted_forever(world, code):
    world.set(progress=["sft 7"], **{"exit codes": {"0": [code] * 9}})
    errors = world.run("gpu.sh", *JOB, expect=code).stderr
    assert "started 3 times without getting further than sft 7; not again" in errors
    assert len(world.runs()) == 4  # the first start reached step 7


def test_a_rewritten_checkpoint_does_not_count_as_an_advance(world):
    """Damaged checkpoints make the last saved step change between 20 and 10."""
    world.set(progress=["sft 20", "sft 10", "sft 20", "sft 10"], **{"exit codes": {"0": [139] * 9}})
    errors = world.run("gpu.sh", *JOB, expect=139).stderr
    assert "started 3 times without getting further than sft 20; not again" in errors
    assert len(world.runs()) == 4


def test_a_later_phase_counts_as_an_advance(world):
    said = ["", "sft 9", "sft 10", "reward 2", "ppo 1", "ppo 2", "sft 99"]
    world.set(progress=said, **{"exit codes": {"0": [75] * 20}})
    assert "further than ppo 2;" in world.run("gpu.sh", *JOB, expect=75).stderr
    assert len(world.runs()) == 9


@pytest.mark.parametrize("code", [1, 2])
def test_a_user_error_is_passed_on_without_a_restart(world, code):
    world.set(**{"exit codes": {"0": [code]}})
    world.run("gpu.sh", *JOB, expect=code)
    assert len(world.runs()) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_makes_the_run_save_without_a_restart(world, number):
    world.set(**{"exit codes": {"0": ["hang"]}})
    process = world.start("gpu.sh", *JOB)
    wait_until((world.folder / "hanging").exists)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as Ctrl-C does
    else:
        process.send_signal(number)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 75, errors
    assert output.splitlines()[1:] == [f"saved after {'SIGINT' if number == signal.SIGINT else 'SIGTERM'}"]
    assert len(world.runs()) == 1
