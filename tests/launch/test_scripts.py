"""Checks of all scripts in launch/ with shellcheck, of their first comments, and of their page docs/launch.md."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT

SCRIPTS = sorted(p for p in (ROOT / "launch").iterdir() if p.suffix in (".sh", ".sbatch"))


def test_shellcheck_finds_no_problem():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:/usr/bin:/usr/local/bin")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: pip install -r requirements-dev.txt")
    # environment.sh is only sourced, so no line names its shell
    command = [shellcheck, "--shell=bash", "--external-sources", *map(str, SCRIPTS)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_valid_and_starts_with_a_description(script):
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    lines = script.read_text().splitlines()
    comment = lines[1 if lines[0].startswith("#!") else 0]
    assert comment.startswith("# ")
    assert max(len(line) for line in lines) <= 130


PAGE = (ROOT / "docs" / "launch.md").read_text()


def test_the_page_in_docs_names_every_script_that_starts_runs():
    for name in ("tpu_vm.sh", "gpu.sh", "slurm.sbatch", "gke_jobset.yaml", "gpu_jobset.yaml", "Dockerfile"):
        assert f"launch/{name}" in PAGE


def test_each_variable_that_the_page_lists_is_set_in_launch():
    table = PAGE[PAGE.index("The scripts and JobSets set these") : PAGE.index("None of the following is set")]
    names = re.findall(r"^\| `(\w+)", table, flags=re.MULTILINE)
    assert len(names) == 6
    set_by = "".join(path.read_text() for path in (ROOT / "launch").iterdir())
    for name in names:
        assert re.search(rf"\bexport {name}=|name: {name}, value: ", set_by), name


def accepted_by_xla(flags):
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    environment = os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_xla_knows_each_flag_that_the_page_names():
    flags = [flag.replace("FOLDER", "/nowhere") for flag in re.findall(r"`(--xla_\S*)`", PAGE)]
    assert len(flags) == 7
    run = accepted_by_xla(flags)
    assert run.returncode == 0, run.stderr[-500:]
    unknown = accepted_by_xla([*flags, "--xla_gpu_no_such_flag=true"])
    assert unknown.returncode != 0
    assert "Unknown flag in XLA_FLAGS: --xla_gpu_no_such_flag" in unknown.stderr
