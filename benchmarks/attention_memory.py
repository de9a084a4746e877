"""Memory of the two forms of attention: temporaries of an SFT step, as the compilers for TPU and GPU reserve them.

    python -m benchmarks.attention_memory --topology=v5p:2x2x2
    python -m benchmarks.attention_memory --topology=h100:8

Two layers of Llama-3-8B's shape, fsdp=8, one row of packed texts per device. Nothing is run: the figures come from the
compilers and are not measurements.
"""

import json
import tempfile
from pathlib import Path

import jax
from absl import app, flags

from jax_rlhf.config import default_config, run_config
from jax_rlhf.plan.all_programs import programs_of
from jax_rlhf.plan.chips import GIB
from jax_rlhf.plan.presets import PRESETS
from jax_rlhf.plan.report import account
from jax_rlhf.plan.topology import describe_topology, layout_on

_TOPOLOGY = flags.DEFINE_string("topology", "v5p:2x2x2", "As in jax_rlhf.plan.")
_LENGTHS = flags.DEFINE_multi_integer("length", [1024, 4096, 8192], "Tokens per row.")


def main(arguments: list[str]) -> None:
    """Prints one table row per length."""
    del arguments
    jax.config.update("jax_platforms", "cpu")
    topology = describe_topology(_TOPOLOGY.value)
    print('| tokens per row | GiB, attention="xla" | GiB, attention="flash" |\n|---|---|---|')
    with tempfile.TemporaryDirectory() as folder:
        shape = Path(folder) / "config.json"
        shape.write_text(json.dumps(PRESETS["llama3-8b"] | {"num_hidden_layers": 2}))
        for length in _LENGTHS.value:
            cells = [_temporaries(str(shape), length, form, topology) for form in ("xla", "flash")]
            print(f"| {length:,} | {cells[0]:.2f} | {cells[1]:.2f} |", flush=True)


def _temporaries(shape: str, length: int, form: str, topology) -> float:
    config = default_config()
    config.phases, config.model.path, config.data.packing = ("sft",), shape, True
    config.data.max_tokens, config.data.sft_batch_size = length, len(topology.devices)
    with config.unlocked():
        config.model.attention = form
    settings = run_config(config)
    layout = layout_on(topology, settings)
    (program,) = programs_of(settings, layout)
    return account(program, topology).temporaries / GIB


if __name__ == "__main__":
    app.run(main)
