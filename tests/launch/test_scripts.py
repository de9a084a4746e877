"""All of launch/: what shellcheck says, and that the scripts say what they are for."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT

SCRIPTS = sorted(p for p in (ROOT / "launch").iterdir() if p.suffix in (".sh", ".sbatch"))


def test_shellcheck_has_nothing_to_say():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:/usr/bin:/usr/local/bin")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: pip install -r requirements-dev.txt")
    # environment.sh, which is only sourced, has no line that names its shell
    command = [shellcheck, "--shell=bash", "--external-sources", *map(str, SCRIPTS)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_valid_and_begins_with_what_it_does(script):
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    lines = script.read_text().splitlines()
    comment = lines[1 if lines[0].startswith("#!") else 0]
    assert comment.startswith("# ")
    assert max(len(line) for line in lines) <= 130


def test_the_page_in_docs_names_every_script_that_starts_runs():
    page = (ROOT / "docs" / "launch.md").read_text()
    for name in ("tpu_vm.sh", "gpu.sh", "slurm.sbatch", "gke_jobset.yaml", "gpu_jobset.yaml", "Dockerfile"):
        assert f"launch/{name}" in page
