"""Weak scaling computed from plans: what a PPO iteration sends as the mesh grows, at fixed rows per device.

    python -m benchmarks.weak_scaling --chip=v5p
    python -m benchmarks.weak_scaling --chip=h100

Llama-3-8B with the settings of configs/llama3_8b.py, 16 rows per device. The figures come from programs compiled ahead
of time and from data sheets (`jax_rlhf/plan/`). They are bounds, not measurements.
"""

import jax
from absl import app, flags

from jax_rlhf.cli.packaged import packaged_config
from jax_rlhf.config import run_config
from jax_rlhf.plan.all_programs import programs_of
from jax_rlhf.plan.chips import GIB
from jax_rlhf.plan.report import account
from jax_rlhf.plan.topology import describe_topology, layout_on

_CHIP = flags.DEFINE_enum("chip", "v5p", ["v5p", "h100"], "The kind of device.")
_ROWS = flags.DEFINE_integer("rows", 16, "Prompts per iteration and device.")

TOPOLOGIES = {"v5p": ("v5p:2x2x2", "v5p:4x4x4", "v5p:4x8x8"), "h100": ("h100:8", "h100:8x8", "h100:32x8")}


def meshes(devices: int) -> list[dict[str, int]]:
    """Meshes to compare: all devices along fsdp, or groups of 8 that each store a replica.

    Args:
      devices: the number of devices.

    Returns:
      Fields of config.mesh.
    """
    whole = {"mesh.data": 1, "mesh.fsdp": devices}
    return [whole] if devices == 8 else [whole, {"mesh.data": devices // 8, "mesh.fsdp": 8}]


def main(arguments: list[str]) -> None:
    """Prints one table row per mesh."""
    del arguments
    jax.config.update("jax_platforms", "cpu")
    heads = "devices", "data × fsdp", "GiB sent per device: rollout, scoring, update", "seconds: products"
    print("| " + " | ".join((*heads, "memory", "links", "network", "latency", "bound by")) + " |\n|" + "---|" * 9)
    for name in TOPOLOGIES[_CHIP.value]:
        topology = describe_topology(name)
        count = len(topology.devices)
        for mesh in meshes(count):
            config = packaged_config("llama3_8b")
            with config.unlocked():
                config.update_from_flattened_dict(
                    mesh | {"phases": ("ppo",), "data.ppo_batch_size": _ROWS.value * count}
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
            print(f"| {count} | {mesh['mesh.data']} × {mesh['mesh.fsdp']} | {sizes} | {bounds} | {bound} |", flush=True)


if __name__ == "__main__":
    app.run(main)
