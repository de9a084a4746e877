"""The rows that the parts of `benchmarks.on_device` print, and the models that several parts run."""

import functools
import json
from collections.abc import Callable
from typing import Any

import jax

from jax_rlhf import Pretrained
from jax_rlhf.hub import config_from_hub
from jax_rlhf.models import Decoder, init_params
from jax_rlhf.models.decoder import Head
from jax_rlhf.plan.chips import Chip
from jax_rlhf.plan.measure import chip_of


def print_row(part: str, *, ok: bool | None = None, **fields: Any) -> None:
    """Prints a row at once, so that it is not lost if the part is killed.

    Args:
      part: the part's name.
      ok: whether a check passed; None = the row is a figure, not a check.
      fields: the row's fields; floats are rounded to 5 digits.
    """
    print(json.dumps({"part": part, **({} if ok is None else {"ok": bool(ok)}), **_rounded(fields)}), flush=True)


def attempt(part: str, case: Any, measure: Callable[[], None]) -> None:
    """Runs one case of several. An error in it is a failed check, and does not affect other cases.

    Args:
      part: the part's name.
      case: the case.
      measure: runs the case, and prints its rows.
    """
    try:
        measure()
    except Exception as error:
        print_row(part, ok=False, case=case, error=f"{type(error).__name__}: {str(error)[:400]}")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value


def llama(tiny: bool, **fields: Any) -> Any:
    """A Llama of 0.8B parameters, or a tiny one.

    Args:
      tiny: use sizes for a CPU.
      fields: fields of its config.json that differ.

    Returns:
      A `DecoderConfig`.
    """
    shape = {
        "model_type": "llama",
        "vocab_size": 32_000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    }
    small = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return config_from_hub(shape | (small if tiny else {}) | fields)


def random_model(config: Any, head: Head, seed: int, dtype: Any) -> Pretrained:
    """A model with random parameters.

    Args:
      config: its `DecoderConfig`.
      head: "lm" or "scalar".
      seed: seed of the parameters.
      dtype: dtype of the parameters.

    Returns:
      The model.
    """
    model = Decoder(config, head=head)
    create = jax.jit(lambda key: jax.tree.map(lambda leaf: leaf.astype(dtype), init_params(model, key)))
    return Pretrained(model, create(jax.random.key(seed)))


@functools.cache
def chip_here() -> Chip | None:
    """The data sheet of this machine's device; None = `jax_rlhf/plan/chips.py` does not list it."""
    return chip_of(jax.devices()[0].device_kind)


def peak_bytes() -> int | None:
    """The first device's peak memory since the process started; None = the device does not report it."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
