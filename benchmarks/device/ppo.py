"""Parts `ppo` and `offload`: iterations of PPO on random models of real shapes."""

import json
import os
import subprocess
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.device.lines import attempt, chip_here, llama, peak_bytes, print_row, random_model
from jax_rlhf import PPOTrainer, Prompts, RLHFEngine
from jax_rlhf.config import default_config, run_config
from jax_rlhf.hub import config_from_hub
from jax_rlhf.models import DecoderConfig
from jax_rlhf.parallel import create_layout
from jax_rlhf.plan.all_programs import programs_of
from jax_rlhf.plan.flops import product_flops
from jax_rlhf.plan.presets import PRESETS

ACTOR, REWARD = "opt-1.3b", "opt-350m"
ROWS, PROMPT, NEW = 64, 256, 256
GOAL = 10_000  # tokens/s of prompts and responses
RATIO_GAP = 1e-2  # bfloat16, with scorer and update as two programs; tests/ppo/test_bfloat16.py has the same bar
_METRICS = ("loss/policy_avg", "loss/value_avg", "objective/kl", "val/first_ratio_gap", "policy/grad_norm")
_SECONDS = ("time/generate", "time/score", "time/train", "time/iteration")


def ppo(tiny: bool) -> None:
    """OPT-1.3B with an OPT-350M reward model and critic, 256 + 256 tokens: DeepSpeed-Chat's setting on one card.

    In bfloat16, with all parameters trained in float32. Source: Yao et al. 2023, table 2 (A100-80, 3,213 tokens/s).
    """
    flops = {} if tiny else phase_flops(ACTOR, REWARD, ROWS, PROMPT, NEW)
    for attention in ("xla",) if jax.default_backend() == "cpu" else ("flash", "xla"):
        attempt(
            "ppo", attention, partial(_measure, attention, flops, tiny)
        )  # the models are freed when the function returns


def _measure(attention: str, flops: dict[str, float], tiny: bool) -> None:
    rows, prompt, new = (4, 8, 8) if tiny else (ROWS, PROMPT, NEW)
    changes = {"dtype": jnp.dtype("bfloat16"), "remat": "full", "attention": attention}
    engine = RLHFEngine(
        random_model(_opt(ACTOR, tiny).replace(**changes), "lm", 0, jnp.bfloat16),
        reward=random_model(_opt(REWARD, tiny).replace(**changes), "scalar", 1, jnp.bfloat16),
    )
    lines = _iterations(engine, rows, prompt, new, count=2 if tiny else 3)
    last, first, chip = lines[-1], lines[0], chip_here()
    seconds = {name.removeprefix("time/"): last[name] for name in _SECONDS}
    row = {
        "attention": attention,
        "rows": rows,
        "tokens": [prompt, new],
        "seconds": seconds,
        "first_iteration_seconds": first["time/iteration"],
        "tokens_per_second": rows * (prompt + new) / seconds["iteration"],
        "generated_tokens_per_second": rows * new / seconds["generate"],
        "goal": GOAL,
        "metrics": [{name: line[name] for name in _METRICS} for line in lines],
        "peak_gib_so_far": _gib(peak_bytes()),
    }
    if flops and chip is not None:
        row["mfu"] = {name: flops[name] / seconds[name] / chip.flops for name in flops}
    # Before the first update the policy is the one that sampled: up to rounding, the KL is 0 and the ratio is 1.
    finite = all(np.isfinite(value) for line in lines for value in line.values())
    good = finite and abs(first["objective/kl"]) < 1e-3 and first["val/first_ratio_gap"] < RATIO_GAP
    bar = f"finite; KL of the first iteration below 1e-3, its first ratio within {RATIO_GAP} of 1"
    print_row("ppo", ok=good, **row, bar=bar)


def _opt(preset: str, tiny: bool) -> DecoderConfig:
    """A preset, or two narrow layers of its kind: opt-350m has norms after its blocks, and a narrower embedding."""
    content = dict(PRESETS[preset])
    if tiny:
        half = content["word_embed_proj_dim"] != content["hidden_size"]
        content |= {"vocab_size": 512, "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2}
        content |= {"num_attention_heads": 4, "word_embed_proj_dim": 32 if half else 64}
    return config_from_hub(content)


def phase_flops(actor: str, reward: str, rows: int, prompt: int, new: int) -> dict[str, float]:
    """FLOPs of the models' matrix products in an iteration, without remat's recomputation.

    Args:
      actor, reward: presets.
      rows, prompt, new: rows of a batch, tokens of a prompt, new tokens of a response.

    Returns:
      The FLOPs of "generate", "score" and "train" on one device.
    """
    config = default_config()
    config.model.path, config.reward_model.path, config.phases = actor, reward, ("ppo",)
    config.data.max_prompt_tokens, config.data.max_tokens, config.data.ppo_batch_size = prompt, prompt + new, rows
    config.ppo.sampling.max_new_tokens, config.ppo.ppo_epochs, config.ppo.num_minibatches = new, 1, 2
    config.ppo.time_phases = True
    for role in ("model", "reference", "critic", "reward_model"):
        config[role].remat = "none"
    settings = run_config(config)
    programs = programs_of(settings, create_layout(settings.mesh, None, jax.devices()[:1]))
    counted = {one.name: product_flops(one.function.trace(*one.arguments).jaxpr) for one in programs}
    return {"generate": counted["rollout"], "score": counted["scoring"], "train": counted["update"]}


def _iterations(engine: RLHFEngine, rows: int, prompt: int, new: int, count: int) -> list[dict[str, float]]:
    learning = {"learning_rate": 1e-6}
    settings = {
        "sampling": {"max_new_tokens": new, "eos_ids": ()},
        "ppo_epochs": 1,
        "num_minibatches": 2,
        "time_phases": True,
        "actor": {"optimizer": learning},
        "critic": {"optimizer": learning},
    }
    trainer, random, lines = PPOTrainer(engine, settings), np.random.RandomState(0), []
    vocab = engine.models.actor.model.config.vocab_size
    for iteration in range(count):
        tokens = random.randint(8, vocab, (rows, prompt)).astype(np.int32)  # no pads
        batch = Prompts(tokens, np.ones_like(tokens, bool), np.arange(rows, dtype=np.int32) + rows * iteration)
        metrics = trainer.train_rlhf(trainer.generate_experience(batch))
        lines.append({name: float(metrics[name]) for name in (*_METRICS, *_SECONDS)})
    return lines


def _gib(size: int | None) -> float | None:
    return None if size is None else size / 2**30


def offload(tiny: bool) -> None:
    """Two iterations, with reference and reward model on the device and offloaded: equal losses, and a lower peak."""
    found = {}
    # Without deterministic operations a sum may round differently, and draw another token, which changes every loss.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true"
    for name in ("on_device", "offloaded"):
        command = [sys.executable, "-m", "benchmarks.on_device", f"--child=iterations_{name}", *["--tiny"] * tiny]
        environment = os.environ | {"XLA_FLAGS": flags}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        found[name] = json.loads(done.stdout.splitlines()[-1])
    on_device, offloaded = found["on_device"], found["offloaded"]
    lines = zip(on_device["lines"], offloaded["lines"], strict=True)
    pairs = [(one[name], two[name]) for one, two in lines for name in one]
    same = all(abs(one - two) <= 1e-3 * max(abs(one), 1e-3) for one, two in pairs)
    peaks = on_device["peak_gib"], offloaded["peak_gib"]
    lower = None in peaks or peaks[1] < peaks[0]
    bar = "losses equal to 0.1 %; a lower peak, if the device reports its peak memory"
    print_row("offload", ok=same and lower, peak_gib=peaks, losses_are_the_same=same, bar=bar)


def iterations_on_device(tiny: bool) -> None:
    """A process of `offload`: all models on the device."""
    _two_iterations(tiny, ())


def iterations_offloaded(tiny: bool) -> None:
    """A process of `offload`: reference and reward model in host memory."""
    _two_iterations(tiny, ("reference", "reward"))


def _two_iterations(tiny: bool, offloaded: tuple[str, ...]) -> None:
    rows, prompt, new = (4, 8, 8) if tiny else (16, 128, 128)
    dtype = jnp.dtype("float32" if tiny else "bfloat16")
    config = llama(tiny).replace(dtype=dtype, remat="full")
    models: dict[str, Any] = {
        "reference": random_model(config, "lm", 2, dtype),
        "reward": random_model(config, "scalar", 1, dtype),
    }
    engine = RLHFEngine(random_model(config, "lm", 0, dtype), **models, offloaded=offloaded)
    models.clear()
    lines = [{name: line[name] for name in _METRICS[:2]} for line in _iterations(engine, rows, prompt, new, count=2)]
    print(json.dumps({"lines": lines, "peak_gib": _gib(peak_bytes())}))
