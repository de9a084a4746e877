"""The examples run, and the models that they train improve.

`python -m tests.test_examples` runs the notebook, and stores it with its output.
"""

import json
import os
import re
import subprocess
import sys

import nbclient
import nbformat

from tests.processes import COMPILED, PYTHONPATH, ROOT

EXAMPLES = ROOT / "examples"
NOTEBOOK = EXAMPLES / "eight_tokens.ipynb"
GAIN = 0.8  # of the possible gain in the objective; an untrained policy has 0, and the stored run 0.96
LARGEST = 150_000  # bytes of a stored notebook

ENVIRONMENT = os.environ | {"PYTHONPATH": PYTHONPATH, "JAX_COMPILATION_CACHE_DIR": str(COMPILED)}
ENVIRONMENT["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


def run(example, *arguments):
    """The lines that an example prints."""
    command = [sys.executable, str(EXAMPLES / example), *map(str, arguments)]
    ended = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout.splitlines()


def executed(notebook):
    """Runs a notebook, and returns it with its output. stderr is left out, because libraries write paths to it."""
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(EXAMPLES)}})
    client.execute(env=ENVIRONMENT)
    for cell in code_cells(notebook):
        cell.metadata.pop("execution", None)  # times
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def gain_of(notebook):
    """The share of the possible gain that the notebook reports."""
    text = "".join(output.get("text", "") for cell in code_cells(notebook) for output in cell.outputs)
    (percent,) = re.findall(r"([\d.-]+)% of the possible gain", text)
    return float(percent) / 100


def test_the_training_loop_in_python_learns():
    lines = run("ppo_loop.py")
    rewards, kls = zip(*(map(float, re.findall(r"reward (\S+), KL (\S+)", line)[0]) for line in lines), strict=True)
    assert len(lines) == 20
    assert kls[0] == 0  # no KL before the first update
    assert kls[-1] > 1
    assert rewards[-1] > rewards[0] + 1  # reward units


def test_a_run_learns_the_custom_reward_function(tmp_path):
    run("custom_reward.py", tmp_path)
    summary = json.loads((tmp_path / "run" / "ppo" / "summary.json").read_text())
    assert summary["eval/score"] > summary["eval/score_before"] + 0.3  # of 1, on held-out prompts
    assert (tmp_path / "run" / "ppo" / "model" / "model.safetensors").is_file()


def test_the_notebook_reaches_most_of_the_possible_gain():
    assert GAIN <= gain_of(executed(nbformat.read(NOTEBOOK, as_version=4))) <= 1


def test_the_stored_notebook_is_the_output_of_one_whole_run():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = code_cells(notebook)
    outputs = [output for cell in cells for output in cell.outputs]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert {output.output_type for output in outputs} == {"stream", "display_data"}
    assert all(output.get("name") != "stderr" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1
    assert GAIN <= gain_of(notebook) <= 1
    assert NOTEBOOK.stat().st_size < LARGEST


if __name__ == "__main__":
    nbformat.write(executed(nbformat.read(NOTEBOOK, as_version=4)), NOTEBOOK)
