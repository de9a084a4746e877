"""Tokens/s, GFLOP/s and memory of sampling from a random model, with default settings; one JSON line.

    python -m benchmarks.generate --shape=small
    python -m benchmarks.generate --shape=small --torch=/path/to/python    # compare with torch `generate`

Float32, no EOS. Figures are medians over repeats, after a first run that compiles. `--torch` names a Python that has
torch and transformers. The two alternate, so a slow minute of the machine affects both.
"""

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks.memory import peak_gigabytes
from benchmarks.shapes import SHAPES, Shape
from jax_rlhf import sample
from jax_rlhf.hub.families import config_from_hub
from jax_rlhf.models import Decoder, init_params


def prepare(shape: Shape) -> tuple[Callable[[int], tuple[float, float]], float]:
    """Compiles sampling and prefill.

    Args:
      shape: the model and the batch.

    Returns:
      (a function that runs both once and returns their seconds, seconds to compile and run the first time).
    """
    model = Decoder(config_from_hub(shape.hub_config))
    params = init_params(model, jax.random.key(0))
    prompts = jax.random.randint(jax.random.key(1), (shape.batch, shape.prompt), 0, shape.vocab_size)
    mask = jnp.ones(prompts.shape, bool)

    def seconds(max_new_tokens: int, key: int) -> float:
        start = time.perf_counter()
        samples = sample(model, params, prompts, mask, jax.random.key(key), max_new_tokens=max_new_tokens)
        jax.block_until_ready(samples)
        return time.perf_counter() - start

    def run(key: int) -> tuple[float, float]:
        return seconds(shape.response, key), seconds(1, key)

    return run, run(0)[0]


def measure(shape: Shape, repeats: int, torch: subprocess.Popen | None) -> tuple[dict, list[float]]:
    """Runs sampling, alternating with torch.

    Args:
      shape: the model and the batch.
      repeats: number of runs.
      torch: a running `torch_generate.py`, or None.

    Returns:
      (result of jax_rlhf, torch's seconds).
    """
    run, first = prepare(shape)
    jax_seconds, torch_seconds = [], []
    for repeat in range(repeats):
        jax_seconds.append(run(repeat))
        if torch is not None:
            print("go", file=torch.stdin, flush=True)
            torch_seconds.append(float(torch.stdout.readline()))
    sampling, prefill = (statistics.median(column) for column in zip(*jax_seconds, strict=True))
    result = {
        "seconds": {"prefill": prefill, "decode": sampling - prefill},
        "first_run_seconds": first,
        "generated_tokens_per_second": shape.batch * shape.response / sampling,
        "milliseconds_per_step": 1000 * (sampling - prefill) / (shape.response - 1),
        "gflop_per_second": shape.flops["sample"] / 1e9 / sampling,
        "peak_memory_gb": peak_gigabytes(),
    }
    return result, torch_seconds


def main() -> None:
    """Parses arguments, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--torch", metavar="PYTHON", help="a Python that has torch and transformers")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    torch = None
    if arguments.torch:
        script = str(Path(__file__).with_name("torch_generate.py"))
        command = [arguments.torch, script, json.dumps(vars(shape))]
        torch = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        torch.stdout.readline()  # its first run has finished
    jax_result, torch_seconds = measure(shape, arguments.repeats, torch)
    result = {"shape": arguments.shape, "device": jax.devices()[0].device_kind, "jax_rlhf": jax_result}
    if torch is not None:
        peak = float(torch.communicate()[0])
        tokens_per_second = shape.batch * shape.response / statistics.median(torch_seconds)
        result["torch"] = {"generated_tokens_per_second": tokens_per_second, "peak_memory_gb": peak}
        result["jax_rlhf_over_torch"] = jax_result["generated_tokens_per_second"] / tokens_per_second
    print(json.dumps(result))


if __name__ == "__main__":
    main()
