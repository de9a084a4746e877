"""Parts `memory`, `resume` and `quickstart`: whole commands, as users call them.

These parts do not use the device in their own process, only in child processes, because JAX reserves most of a card's
memory.
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

from benchmarks.device.lines import attempt, llama, print_row, random_model
from jax_rlhf import save_pretrained
from jax_rlhf.models.decoder import Head
from jax_rlhf.plan.chips import CARDS

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

MEMORY_RUN = {
    "data.sft_batch_size": 8,
    "data.reward_batch_size": 8,
    "data.ppo_batch_size": 32,
    "data.eval_rows": 8,
    "sft.microbatch_size": 8,
    "sft.sample_rows": 0,
    "reward.microbatch_size": 8,
    "reward.normalize_rows": 0,
    "ppo.num_minibatches": 2,
    "ppo.sampling.max_new_tokens": 256,
}
"""Changes of part `memory` to configs/llama3_8b.py, so that the run fits a card of 80 GB."""


def _run(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **(environment or {})}
    )


@functools.cache
def device_of_children() -> tuple[str, str, int | None]:
    """The device that child processes run on.

    Returns:
      (JAX's platform, JAX's name of the device, bytes that JAX may use on the device; None = not reported).
    """
    ask = (
        "import jax, json; d = jax.local_devices()[0]; "
        "print(json.dumps([d.platform, d.device_kind, (d.memory_stats() or {}).get('bytes_limit')]))"
    )
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def memory(tiny: bool) -> None:
    """Compares the device's peak memory with two plans, within 10 %: one compiled here, one for a described card.

    The second plan is that of `--topology` on a machine without the card. It is compiled on the CPU at the same time.
    """
    platform, kind, limit = device_of_children()
    if limit is None:
        print_row("memory", not_run=f"{platform} devices do not report their memory")
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(_SHAPE))
        config = Path(__file__).parents[2] / "configs" / "llama3_8b.py"
        settings = MEMORY_RUN | {"model.path": file}
        flags = [f"--config={config}", *(f"--config.{name}={value}" for name, value in settings.items())]
        flags += ["--json", "--noadvice"]
        name = next((name for name, card in CARDS.items() if card.name == kind), None)
        described = _started_plan([*flags, f"--topology={name}:1"]) if name else None
        measured, planned = _finished_plan(_started_plan([*flags, "--measure"])), {}
        if described is not None:
            attempt("memory", f"plan for {name}:1", lambda: planned.update(_finished_plan(described)))
    for row in compared_peaks(measured, planned):
        print_row("memory", **row, bar="within 10 %")


def _started_plan(flags: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "jax_rlhf.plan", *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _finished_plan(process: subprocess.Popen[str]) -> dict[str, dict[str, Any]]:
    """The rows of a plan, by program."""
    printed = process.communicate()[0]
    if process.returncode not in (0, 3):
        raise RuntimeError(f"{' '.join(process.args[1:3])} exited with {process.returncode}; see standard error")
    return {f"{row['phase']} {row['name']}": row for row in json.loads(printed)["programs"]}


def compared_peaks(measured: dict[str, dict[str, Any]], described: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per program.

    Args:
      measured: rows of the plan that also ran the programs, smallest first; `measured` is the peak so far.
      described: rows of the plan for a described card; empty = no such plan.

    Returns:
      Rows with the program's name, the peaks in GiB, measured / planned, and whether all ratios are within 10 % of 1.
    """
    rows, highest, highest_described = [], 0.0, 0.0
    for program, row in sorted(measured.items(), key=lambda item: item[1]["peak"]):
        highest = max(highest, row["peak"])
        plans = {"planned": highest}
        if program in described:
            highest_described = max(highest_described, described[program]["peak"])
            plans["described"] = highest_described
        found = {f"{name}_gib": peak / 2**30 for name, peak in plans.items()}
        ratios = []
        if row["measured"] is not None:
            ratios = [row["measured"] / peak for peak in plans.values()]
            found["measured_gib"] = row["measured"] / 2**30
            found |= {f"measured_over_{name}": ratio for name, ratio in zip(plans, ratios, strict=True)}
        good = bool(ratios) and all(abs(ratio - 1) < 0.1 for ratio in ratios)
        rows.append({"ok": good, "program": program, **found})
    return rows


def _write_start(folder: Path, layers: int, head: Head = "lm") -> None:
    """Writes a tiny random model whose tokenizer has only letters."""
    letters = {letter: index for index, letter in enumerate(("<pad>", "<eos>", *"abcdefghijklmnopqrstuvwxyz ,.'"))}
    bare = Tokenizer(models.WordLevel(letters, unk_token="<pad>"))
    bare.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>")
    start = random_model(llama(True, eos_token_id=1, pad_token_id=0, num_hidden_layers=layers), head, 0, jnp.float32)
    save_pretrained(folder, dataclasses.replace(start, tokenizer=tokenizer))


def resume(tiny: bool) -> None:
    """A PPO run that is stopped and resumed must equal an uninterrupted run bit for bit.

    Uses XLA's deterministic operations, without which a GPU may sum in another order each time.
    """
    del tiny  # a tiny model in any case
    jax.config.update("jax_platforms", "cpu")  # for this process, which only writes the checkpoint
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_start(folder / "policy", layers=2)
        _write_start(folder / "reward", layers=2, head="scalar")
        random = np.random.RandomState(0)
        prompts = ["".join(random.choice(list("abcdefghij"), 4)) for _ in range(64)]
        (folder / "rows.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        codes = [_stopped(folder, "stopped"), _train(folder, "stopped").wait(), _train(folder, "whole").wait()]
        bar = "exit codes 75, 0, 0; equal bit for bit"
        if codes == [75, 0, 0]:
            equal = _digest(folder / "stopped") == _digest(folder / "whole")
            print_row("resume", ok=equal, exit_codes=codes, equal=equal, bar=bar)
        else:
            logs = {workdir: (folder / f"{workdir}.log").read_text()[-500:] for workdir in ("stopped", "whole")}
            print_row("resume", ok=False, exit_codes=codes, logs=logs, bar=bar)


def _train(folder: Path, workdir: str) -> subprocess.Popen[str]:
    flags = {
        "phases": "ppo",
        "model.path": folder / "policy",
        "sft_model_path": folder / "policy",
        "reward_model.path": folder / "reward",
        "data.paths": f"{folder / 'rows.jsonl'},",
        "data.max_prompt_tokens": 8,
        "data.ppo_batch_size": 8,
        "ppo.iterations": 6,
        "ppo.sampling.max_new_tokens": 8,
        "data.eval_rows": 4,
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
    """The exit code of a run that receives SIGTERM once PPO has written a line of metrics."""
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
    """All three phases with the real model and data: seconds, and the bars of configs/quickstart.py's docstring.

    If tiny, it runs a few steps of a random model on the same data with the same judge, and checks no bars.
    """
    short = ("--config.sft.steps=4", "--config.reward.steps=5", "--config.ppo.iterations=3")
    few = ("--config.data.sft_batch_size=2", "--config.data.reward_batch_size=2", "--config.data.ppo_batch_size=4")
    small = ("--config.data.eval_rows=8", "--config.ppo.eval_rows=8", "--config.reward.normalize_rows=8")
    with tempfile.TemporaryDirectory() as name:
        if tiny:
            jax.config.update("jax_platforms", "cpu")  # for this process
            _write_start(Path(name) / "start", layers=8)
            few += (f"--config.model.path={name}/start",)
        start = time.perf_counter()
        config = Path(__file__).parents[2] / "configs" / "quickstart.py"
        flags = [f"--config={config}", f"--workdir={name}/run", *((*short, *few, *small) if tiny else ())]
        done = _run("jax_rlhf", *flags)
        seconds = time.perf_counter() - start
        if done.returncode:
            print_row("quickstart", ok=False, rc=done.returncode, error=done.stderr[-1500:])
            return
        summaries = {phase: _summary(Path(name), phase) for phase in ("sft", "reward", "ppo")}
        lines = (Path(name) / "run" / "ppo" / "metrics.jsonl").read_text().splitlines()
    found = quickstart_figures(summaries, [json.loads(line) for line in lines])
    missed = [] if tiny else missed_bars(found)
    bars = None if tiny else {figure: [low, high] for figure, (low, high) in QUICKSTART_BARS.items()}
    print_row("quickstart", ok=not missed, seconds=seconds, **found, missed=missed, bars=bars)


QUICKSTART_BARS: dict[str, tuple[float | None, float | None]] = {
    "held_out_nats": (None, 4.4),
    "auc": (0.83, None),
    "positive_gain": (0.20, None),
    "kl": (0.0, 12.0),
    "length": (12.0, None),
    "distinct_1_share": (0.7, None),
    "distinct_responses": (0.97, None),
    "lowest_ratio": (0.9, None),
    "highest_ratio": (None, 1.1),
    "highest_clipped_share": (None, 0.2),
    "highest_approximate_kl": (None, 0.05),
}
"""Bars of configs/quickstart.py: lowest and highest allowed value; tests/test_quickstart.py has the same."""


def quickstart_figures(summaries: dict[str, dict[str, Any]], metrics: list[dict[str, Any]]) -> dict[str, float]:
    """The figures that have a bar, from the files of a run.

    Args:
      summaries: the content of summary.json, by phase.
      metrics: the lines of the PPO phase's metrics.jsonl.

    Returns:
      Figure → value.
    """
    after, iterations = summaries["ppo"], [line for line in metrics if "val/ratio" in line]
    return {
        "held_out_nats": summaries["sft"]["eval/loss"],
        "auc": summaries["reward"]["eval/auc"],
        "positive_gain": after["eval/positive"] - after["eval/positive_before"],
        "kl": after["eval/kl"],
        "length": after["eval/length"],
        "distinct_1_share": after["eval/distinct_1"] / after["eval/distinct_1_before"],
        "distinct_responses": after["eval/distinct_responses"],
        "lowest_ratio": min(line["val/ratio"] for line in iterations),
        "highest_ratio": max(line["val/ratio"] for line in iterations),
        "highest_clipped_share": max(line["policy/clipfrac_avg"] for line in iterations),
        "highest_approximate_kl": max(line["policy/approxkl_avg"] for line in iterations),
    }


def missed_bars(found: dict[str, float]) -> list[str]:
    """The figures that miss their bars.

    Args:
      found: the result of `quickstart_figures`.

    Returns:
      Their names; NaN misses its bar.
    """
    reached = lambda value, low, high: (low is None or value >= low) and (high is None or value <= high)  # noqa: E731
    return [name for name, (low, high) in QUICKSTART_BARS.items() if not reached(found[name], low, high)]


def _summary(folder: Path, phase: str) -> dict[str, Any]:
    return json.loads((folder / "run" / phase / "summary.json").read_text())
