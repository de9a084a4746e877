"""Part `decode`: milliseconds per step and tokens/s of sampling, compared with the bytes that a step must read."""

import collections
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.device.lines import attempt, chip_here, llama, print_row, random_model
from jax_rlhf.models import Decoder, DecoderConfig, model_jit, unstack_layers
from jax_rlhf.plan.shapes import model_shape
from jax_rlhf.rl import Prompts
from jax_rlhf.sampling import Sampling, decodes_unrolled, rollout

PROMPT, NEW = 128, 256
GOAL = 0.6  # of the bound
MODELS = ("llama3.2-1b", "smollm2-135m")


def decode(tiny: bool) -> None:
    """Llama-3.2-1B and SmolLM2-135M, 32 and 256 rows; with 256 rows both unrolled and scanned layers."""
    scanned = not decodes_unrolled(_config(MODELS[0], tiny))
    cases = [(MODELS[0], 4, scanned), (MODELS[0], 4, not scanned)]
    if not tiny:  # the form that sampling uses comes first
        cases = [(name, rows, scanned) for name in MODELS for rows in (256, 32)]
        cases += [(name, 256, not scanned) for name in MODELS]
    for case in cases:
        attempt("decode", case, partial(_measure, *case, tiny))
    if jax.default_backend() != "cpu":
        attempt("decode", "profile", _profile)


def decode_captured(tiny: bool) -> None:
    """One case of `decode`, started by the driver with XLA_FLAGS that also run loops as one CUDA graph."""
    _measure(MODELS[0], 4 if tiny else 32, False, tiny)


def _config(name: str, tiny: bool) -> DecoderConfig:
    config = llama(True) if tiny else model_shape(name)[0]
    return config.replace(dtype=jnp.dtype("bfloat16"))


def step_bytes(config: DecoderConfig, kernels: int, rows: int, prompt: int, new: int) -> float:
    """Bytes that a decode step must read, averaged over a rollout without EOS.

    Args:
      config: the model's config.
      kernels: bytes of its parameters, without an embedding table that is only used for lookups.
      rows: rows of the batch.
      prompt, new: tokens per row.

    Returns:
      Bytes of the kernels, and of the keys and values in the filled slots: P + 1 slots in the first of R − 1 steps,
      P + R − 1 in the last.
    """
    slot = 2 * config.num_layers * rows * config.num_kv_heads * config.head_dim * config.dtype.itemsize
    return kernels + slot * (prompt + new / 2)


def _measure(name: str, rows: int, scanned: bool, tiny: bool) -> None:
    config, (prompt, new) = _config(name, tiny), (16, 16) if tiny else (PROMPT, NEW)
    model = Decoder(config, scan_layers=scanned)
    params = random_model(config, "lm", 0, jnp.bfloat16).params
    if not config.tie_embeddings:
        raise ValueError(f"{name}: its embedding table is not tied to the head, so a step reads only a few of its rows")
    kernels = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    if not scanned:
        params = unstack_layers(params, config.num_layers)
    tokens = jax.random.randint(jax.random.key(1), (rows, prompt), 0, config.vocab_size)
    run, first = {}, {}
    for length in (new, 1):
        run[length], first[length] = _compiled(model, params, tokens, length)
    seconds = {length: min(_seconds(run[length], key) for key in range(1, 4)) for length in run}
    step = (seconds[new] - seconds[1]) / (new - 1)
    row = {
        "model": "tiny" if tiny else name,
        "rows": rows,
        "layers": "scanned" if scanned else "unrolled",
        "used_here": scanned != decodes_unrolled(config),
        "compile_seconds": first[new],
        "prefill_ms": 1000 * seconds[1],
        "step_ms": 1000 * step,
        "tokens_per_second": rows * new / seconds[new],
    }
    chip = chip_here()
    if chip is not None:
        bound = step_bytes(config, kernels, rows, prompt, new) / chip.bandwidth
        row |= {"bound_ms": 1000 * bound, "share_of_bound": bound / step, "goal": GOAL}
    print_row("decode", **row)


def _compiled(model: Decoder, params: Any, tokens: jax.Array, length: int) -> tuple[Callable[[int], Any], float]:
    prompts = Prompts(tokens, jnp.ones(tokens.shape, bool), jnp.arange(len(tokens)), columns=None)

    @model_jit  # as a run compiles sampling
    def draw(params: Any, key: jax.Array) -> Any:
        return rollout(model, params, prompts, key, Sampling(length))

    start = time.perf_counter()
    jax.block_until_ready(draw(params, jax.random.key(0)))
    return lambda key: draw(params, jax.random.key(key)), time.perf_counter() - start


def _seconds(run: Callable[[int], Any], key: int) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run(key))
    return time.perf_counter() - start


def _profile() -> None:
    """Prints the kernels that take the most time in a rollout of 32 rows."""
    config = _config(MODELS[0], False)
    params = unstack_layers(random_model(config, "lm", 0, jnp.bfloat16).params, config.num_layers)
    tokens = jnp.ones((32, PROMPT), jnp.int32)
    run, _ = _compiled(Decoder(config, scan_layers=False), params, tokens, 16)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run(1))
        (file,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
    spent = device_time(data)
    top = {name[:80]: nanoseconds / 1e6 for name, nanoseconds in spent.most_common(8)}
    print_row("decode", profile="16 new tokens", device_ms=sum(spent.values()) / 1e6, top_ms=top)


def device_time(profile: Any) -> collections.Counter[str]:
    """Device time by kernel, from a profile.

    Args:
      profile: a `jax.profiler.ProfileData`.

    Returns:
      Kernel (on GPU) or operation (on TPU) → nanoseconds; empty if the profile has only CPUs.
    """
    spent: collections.Counter[str] = collections.Counter()
    for plane in profile.planes:
        if plane.name.startswith("/device:") and "CUSTOM" not in plane.name:
            lines = list(plane.lines)
            # On GPU, the streams' kernels. The lines of operations would count the same time again.
            kernels = [line for line in lines if line.name.startswith("Stream")]
            for line in kernels or [line for line in lines if line.name == "XLA Ops"]:
                for event in line.events:
                    spent[event.name] += event.duration_ns
    return spent
