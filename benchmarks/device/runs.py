"""Parts `memory`, `resume` and `quickstart`: whole commands, as users call them.

The processes here leave the device to those that they start: JAX takes most of a card's memory for itself.
"""

import dataclasses
import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.device.lines import llama, random_model, say
from jax_rlhf import save_pretrained

_SHAPE = {
    "model_type": "llama",
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 12,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


def _run(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **(environment or {})}
    )


@functools.cache
def device_of_children() -> tuple[str, int | None]:
    """What the processes that this one starts run on.

    Returns:
      (JAX's platform, bytes that a device lets JAX use; None = it does not say).
    """
    ask = "import jax; d = jax.local_devices()[0]; print(d.platform, (d.memory_stats() or {}).get('bytes_limit', ''))"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    platform, *limit = done.stdout.splitlines()[-1].split()
    return platform, int(limit[0]) if limit else None


def memory(tiny: bool) -> None:
    """The plan's peaks against what the device says that it held: within 10 %."""
    backend, limit = device_of_children()
    if limit is None:
        say("memory", not_run=f"{backend} devices do not report their memory")
        return
    with tempfile.TemporaryDirectory() as folder:
        shape = _SHAPE | ({"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512} if tiny else {})
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(shape))
        done = _run(
            "jax_rlhf.plan",
            f"--config={Path(__file__).parents[2] / 'configs' / 'llama3_8b.py'}",
            f"--config.model.path={file}",
            *("--config.data.sft_batch_size=8", "--config.data.reward_batch_size=8", "--config.data.ppo_batch_size=32"),
            *("--config.sft.microbatch_size=8", "--config.reward_training.microbatch_size=8"),
            *("--config.ppo.num_minibatches=2", "--config.ppo.max_new_tokens=256", "--config.data.eval_rows=0"),
            *("--config.reward_training.normalize_rows=0", "--measure", "--json", "--noadvice"),
        )
    if done.returncode not in (0, 3):
        say("memory", ok=False, error=done.stderr[-1500:])
        return
    highest = 0.0
    for row in sorted(json.loads(done.stdout)["programs"], key=lambda row: row["peak"]):
        highest = max(highest, row["peak"])  # the device says the most so far
        ratio = None if row["measured"] is None else row["measured"] / highest
        good = ratio is not None and abs(ratio - 1) < 0.1
        planned = {"planned_gib": row["peak"] / 2**30, "measured_over_planned": ratio}
        say("memory", ok=good, program=f"{row['phase']} {row['name']}", **planned, bar="within 10 %")


def _write_start(folder: Path, layers: int) -> None:
    """A random model over letters, whose tokens are too few for a real one's."""
    letters = {letter: index for index, letter in enumerate(("<pad>", "<eos>", *"abcdefghijklmnopqrstuvwxyz ,.'"))}
    bare = Tokenizer(models.WordLevel(letters, unk_token="<pad>"))
    bare.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>")
    start = random_model(llama(True, eos_token_id=1, pad_token_id=0, num_hidden_layers=layers), "lm", 0, jnp.float32)
    save_pretrained(folder, dataclasses.replace(start, tokenizer=tokenizer))


def resume(tiny: bool) -> None:
    """A run of all phases that is stopped in PPO and started again, against one that is not: equal to the bit.

    With XLA's deterministic operations, without which a GPU may add in another order each time.
    """
    del tiny  # a tiny model in any case
    jax.config.update("jax_platforms", "cpu")  # of this process: it only writes the checkpoint
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_start(folder / "start", layers=2)
        random = np.random.RandomState(0)
        rows = [["".join(random.choice(list("abcdefghij"), 4)) for _ in range(3)] for _ in range(64)]
        with (folder / "rows.jsonl").open("w") as file:
            for prompt, chosen, rejected in rows:
                file.write(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}) + "\n")
        first = _stopped(folder, "stopped")
        codes = [first, _train(folder, "stopped").wait(), _train(folder, "whole").wait()]
        bar = "exit codes 75, 0, 0; equal to the bit"
        if codes == [75, 0, 0]:
            equal = _digest(folder / "stopped") == _digest(folder / "whole")
            say("resume", ok=equal, exit_codes=codes, equal=equal, bar=bar)
        else:
            logs = {workdir: (folder / f"{workdir}.log").read_text()[-500:] for workdir in ("stopped", "whole")}
            say("resume", ok=False, exit_codes=codes, logs=logs, bar=bar)


def _train(folder: Path, workdir: str) -> subprocess.Popen[str]:
    flags = {
        "phases": "sft,reward,ppo",
        "model.path": folder / "start",
        "data.paths": f"{folder / 'rows.jsonl'},",
        "data.max_prompt_tokens": 8,
        "data.max_tokens": 16,
        **{f"data.{phase}_batch_size": 8 for phase in ("sft", "reward", "ppo")},
        "sft.steps": 2,
        "reward_training.steps": 2,
        "ppo.iterations": 6,
        "ppo.max_new_tokens": 8,
        "data.eval_rows": 4,
        "reward_training.normalize_rows": 8,
    }
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if device_of_children()[0] == "gpu":
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true"
    config = Path(__file__).parents[2] / "configs" / "ppo.py"
    command = [sys.executable, "-m", "jax_rlhf", f"--config={config}", f"--workdir={folder / workdir}"]
    command += [f"--config.{name}={value}" for name, value in flags.items()]
    with (folder / f"{workdir}.log").open("a") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True)


def _stopped(folder: Path, workdir: str) -> int:
    """The exit code of a run that gets SIGTERM once PPO has written a line."""
    process, metrics = _train(folder, workdir), folder / workdir / "ppo" / "metrics.jsonl"
    while process.poll() is None:
        if metrics.exists() and '"objective/kl"' in metrics.read_text():
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.05)
    return process.wait()


def _digest(workdir: Path) -> str:
    files = (workdir / "ppo" / "model" / "model.safetensors", workdir / "ppo" / "critic" / "model.safetensors")
    return " ".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)


def quickstart(tiny: bool) -> None:
    """The real model and data, all three phases: seconds, and the bars of configs/quickstart.py's docstring.

    Where it is tiny: a few steps of a random model, on the same data and with the same judge.
    """
    short = ("--config.sft.steps=4", "--config.reward_training.steps=5", "--config.ppo.iterations=3")
    few = ("--config.data.sft_batch_size=2", "--config.data.reward_batch_size=2", "--config.data.ppo_batch_size=4")
    small = ("--config.data.eval_rows=8", "--config.ppo.eval_rows=8", "--config.reward_training.normalize_rows=8")
    with tempfile.TemporaryDirectory() as name:
        if tiny:
            jax.config.update("jax_platforms", "cpu")  # of this process
            _write_start(Path(name) / "start", layers=8)
            few += (f"--config.model.path={name}/start",)
        start = time.perf_counter()
        config = Path(__file__).parents[2] / "configs" / "quickstart.py"
        flags = [f"--config={config}", f"--workdir={name}/run", *((*short, *few, *small) if tiny else ())]
        done = _run("jax_rlhf", *flags)
        seconds = time.perf_counter() - start
        if done.returncode:
            say("quickstart", ok=False, rc=done.returncode, error=done.stderr[-1500:])
            return
        found = {phase: _summary(Path(name), phase) for phase in ("sft", "reward", "ppo")}
    reached = {
        "held_out_nats": (found["sft"]["eval/loss"], found["sft"]["eval/loss"] < 4.4),
        "auc": (found["reward"]["eval/auc"], found["reward"]["eval/auc"] >= 0.83),
        "positive": (
            [found["ppo"]["eval/positive_before"], found["ppo"]["eval/positive"]],
            found["ppo"]["eval/positive"] - found["ppo"]["eval/positive_before"] >= 0.20,
        ),
        "kl": (found["ppo"]["eval/kl"], 0 <= found["ppo"]["eval/kl"] <= 12),
    }
    good = tiny or all(good for _, good in reached.values())
    figures = {name: value for name, (value, _) in reached.items()}
    bar = "runs" if tiny else "loss < 4.4, AUC ≥ 0.83, positive + 0.20, KL ≤ 12"
    say("quickstart", ok=good, seconds=seconds, **figures, bar=bar)


def _summary(folder: Path, phase: str) -> dict[str, Any]:
    return json.loads((folder / "run" / phase / "summary.json").read_text())
