"""Parts `env` and `numbers`: what is installed, and whether this device computes what the machine's CPU computes."""

import importlib.metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.device.lines import llama, say
from jax_rlhf import sample, token_logprobs
from jax_rlhf.models import Decoder, init_params

_PACKAGES = (
    *("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu", "flax", "optax", "chex"),
    *("orbax-checkpoint", "transformers", "tokenizers", "huggingface_hub", "datasets", "grain", "ml_collections"),
    *("gguf", "numpy", "pyarrow", "safetensors", "filelock"),
)


def env(tiny: bool) -> None:
    """Versions, devices, imports."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    devices = [device.device_kind for device in jax.devices()]
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    expected = "cpu" if tiny else ("gpu", "tpu")
    say("env", ok=jax.default_backend() in expected, devices=devices, versions=versions, bytes_limit=memory)


def numbers(tiny: bool) -> None:
    """Log-probs, their gradient, and greedy tokens, in float32 and in bfloat16, against the CPU in float32.

    float32 has to agree to 1e-4; bfloat16 to three times what it costs on the CPU.
    """
    here, rows = jax.default_backend(), 4 if tiny else 8
    exact = _run("cpu", jnp.float32, rows)
    cost = _differences(exact, _run("cpu", jnp.bfloat16, rows))
    say("numbers", device="cpu", dtype="bfloat16", **cost)
    found = _differences(exact, _run(here, jnp.float32, rows))
    same = found["rows_with_the_same_tokens"] == 1
    bars = "gradient and log-probs: 1e-4; the same greedy tokens in all rows"
    good = max(found["gradient"], found["logprobs"]) < 1e-4 and same
    say("numbers", ok=good, device=here, dtype="float32", **found, bar=bars)
    found = _differences(exact, _run(here, jnp.bfloat16, rows))
    good = all(found[name] < 3 * cost[name] + 1e-6 for name in ("gradient", "logprobs"))
    say("numbers", ok=good, device=here, dtype="bfloat16", **found, bar="3 × bfloat16 on the CPU")


def _run(platform: str, dtype: Any, rows: int) -> dict[str, Any]:
    with jax.default_device(jax.local_devices(backend=platform)[0]):
        config = llama(True, hidden_size=256, intermediate_size=512, num_hidden_layers=4)
        model = Decoder(config.replace(remat="full", dtype=jnp.dtype(dtype)))
        params = init_params(model, jax.random.key(0))
        params = jax.tree.map(lambda leaf: (leaf * (1.5 if leaf.ndim > 1 else 1)).astype(dtype), params)
        random, length, width = np.random.RandomState(0), 48, 24
        lengths = random.randint(4, length + 1, rows)
        mask = jnp.asarray(np.arange(length) >= length - lengths[:, None])
        tokens = jnp.asarray(random.randint(0, 512, (rows, length)))

        def mean(params: Any) -> jax.Array:
            return jnp.sum(token_logprobs(model, params, tokens, mask)) / jnp.sum(mask[:, 1:] & mask[:, :-1])

        gradient = jax.jit(jax.grad(mean))(params)
        logprobs = token_logprobs(model, params, tokens, mask)
        prompt_mask = jnp.asarray(np.arange(width) >= width - np.minimum(lengths, width)[:, None])
        how = {"max_new_tokens": 24, "top_k": 1}
        drawn = sample(model, params, tokens[:, :width], prompt_mask, jax.random.key(1), **how)
        gradient = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), jax.device_get(gradient))
        return {"gradient": gradient, "logprobs": np.asarray(logprobs, np.float64), "tokens": np.asarray(drawn.tokens)}


def _differences(exact: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Of gradients the norm of the difference over the norm, of log-probs the largest, in nats."""
    leaves = list(zip(jax.tree.leaves(exact["gradient"]), jax.tree.leaves(other["gradient"]), strict=True))
    norm = np.sqrt(sum(np.sum(one**2) for one, _ in leaves))
    return {
        "gradient": float(np.sqrt(sum(np.sum((one - two) ** 2) for one, two in leaves)) / norm),
        "logprobs": float(np.abs(exact["logprobs"] - other["logprobs"]).max()),
        "rows_with_the_same_tokens": float(np.mean((exact["tokens"] == other["tokens"]).all(axis=1))),
    }
