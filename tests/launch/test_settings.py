"""What docs/launch.md says of XLA's flags."""

import re
import subprocess
import sys

import pytest

from tests.processes import ROOT

PAGE = (ROOT / "docs" / "launch.md").read_text()
FLAGS = re.findall(r"`XLA_FLAGS=(--[^`]+)`", PAGE)


def starts(flags):
    """Whether JAX computes with them, and what it says."""
    command = [sys.executable, "-c", "import jax.numpy as jnp; print(int(jnp.ones(3).sum()))"]
    env = {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    return done.returncode == 0 and done.stdout == "3\n", done.stderr


def test_a_flag_that_there_is_not_ends_the_program():
    ok, said = starts("--xla_gpu_enable_such_a_thing=true")
    assert not ok
    assert "Unknown flag" in said


@pytest.mark.parametrize("flags", FLAGS)
def test_the_flags_that_the_page_names_are_known(flags):
    ok, said = starts(flags)
    assert ok, said[-2000:]


def test_the_page_has_the_flags_in_this_form():
    assert len(FLAGS) == PAGE.count("XLA_FLAGS=") == 3


@pytest.mark.parametrize("name", ["JAX_PLATFORMS", "XLA_PYTHON_CLIENT_MEM_FRACTION", "JAX_COMPILATION_CACHE_DIR"])
def test_what_the_launchers_are_said_to_set_they_set(name):
    kept = name == "JAX_COMPILATION_CACHE_DIR"
    for file in ("gpu.sh", "slurm.sbatch", "gpu_jobset.yaml"):
        text = (ROOT / "launch" / file).read_text()
        assert name in text or (kept and 'keep_compiled "$@"' in text), file
