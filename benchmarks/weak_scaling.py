"""Weak scaling on paper: what a PPO iteration sends as the mesh grows, the rows per device staying the same.

    python -m benchmarks.weak_scaling --chip=v5p
    python -m benchmarks.weak_scaling --chip=h100

Llama-3-8B as configs/llama3_8b.py has it, 16 rows per device. From programs compiled ahead of time and from data sheets
(`jax_rlhf/plan/`): bounds, not measurements.
"""

import jax
from absl import app, flags

from jax_rlhf.cli.packaged import packaged_config
from jax_rlhf.config import run_config
from jax_rlhf.plan.all_programs import programs_of
from jax_rlhf.plan.chips import GIB
from jax_rlhf.plan.report import account
from jax_rlhf.plan.topology import describe_topology, layout_on

_CHIP = flags.DEFINE_enum("chip", "v5p", ["v5p", "h100"], "Which.")
_ROWS = flags.DEFINE_integer("rows", 16, "Prompts an iteration and device.")

TOPOLOGIES = {"v5p": ("v5p:2x2x2", "v5p:4x4x4", "v5p:4x8x8"), "h100": ("h100:8", "h100:8x8", "h100:32x8")}


def forms(devices: int) -> list[dict[str, int]]:
    """Meshes to compare: all along fsdp, or groups of 8 that hold copies.

    Args:
      devices: how many.

    Returns:
      Fields of config.mesh.
    """
    whole = {"mesh.data": 1, "mesh.fsdp": devices}
    return [whole] if devices == 8 else [whole, {"mesh.data": devices // 8, "mesh.fsdp": 8}]


def main(arguments: list[str]) -> None:
    """Prints a row of a table for each mesh."""
    del arguments
    jax.config.update("jax_platforms", "cpu")
    heads = "devices", "data × fsdp", "GiB sent per device: rollout, scoring, update", "seconds: products"
    print("| " + " | ".join((*heads, "memory", "links", "network", "latency", "bound by")) + " |\n|" + "---|" * 9)
    for name in TOPOLOGIES[_CHIP.value]:
        topology = describe_topology(name)
        count = len(topology.devices)
        for form in forms(count):
            config = packaged_config("llama3_8b")
            with config.unlocked():
                config.update_from_flattened_dict(
                    form | {"phases": ("ppo",), "data.ppo_batch_size": _ROWS.value * count}
                )
            settings = run_config(config)
            layout = layout_on(topology, settings)
            accounts = [account(one, topology) for one in programs_of(settings, layout) if one.name != "export"]
            sent = [sum(one.count * one.bytes for one in each.collectives) / GIB for each in accounts]
            seconds = {kind: sum(each.seconds[kind] for each in accounts) for kind in accounts[0].seconds}
            bounds = " | ".join(
                f"{seconds[kind]:.2f}" for kind in ("products", "memory", "links", "network", "latency")
            )
            sizes = ", ".join(f"{size:.0f}" for size in sent)
            bound = max(seconds, key=seconds.get)
            print(f"| {count} | {form['mesh.data']} × {form['mesh.fsdp']} | {sizes} | {bounds} | {bound} |", flush=True)


if __name__ == "__main__":
    app.run(main)
