"""`python -m jax_rlhf.plan --config=FILE [--config.a.b=value …] --topology=v5p:2x2x4 [--json]`: a plan before you rent.

Compiles every jitted function of the run ahead of time. It needs no weights, no data, no network, and not the hardware.
With --measure instead of --topology it runs on the hardware, and shows measured memory too. The exit code is 0 if
everything fits, 3 if something does not.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence

import jax
from absl import app, flags, logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jax_rlhf.cli.flags import CONFIG, parse_flags
from jax_rlhf.config import run_config
from jax_rlhf.hub import CheckpointError
from jax_rlhf.io.printable import printable_lines
from jax_rlhf.io.terminal import make_output_harmless
from jax_rlhf.parallel import tensor_has_fast_links
from jax_rlhf.plan.abstract import Program
from jax_rlhf.plan.advice import Advice, advice
from jax_rlhf.plan.all_programs import programs_of
from jax_rlhf.plan.host import host_accounts
from jax_rlhf.plan.measure import measured_peak, topology_here
from jax_rlhf.plan.report import Account, account
from jax_rlhf.plan.tables import as_json, as_table
from jax_rlhf.plan.topology import Topology, describe_topology, layout_on

_TOPOLOGY = flags.DEFINE_string("topology", None, "v5p:2x2x4, v5e:…, v6e:…, h100:8, h100:4x8, 2*v5p:2x2x4 (slices).")
_JSON = flags.DEFINE_bool("json", False, "The plan as JSON on standard output.")
_MEASURE = flags.DEFINE_bool("measure", False, "Plan for the available devices, and run each program once on zeros.")
_ADVICE = flags.DEFINE_bool("advice", True, "If something does not fit, try out which settings would help.")

DOES_NOT_FIT = 3


def main(arguments: Sequence[str]) -> int:
    """Prints the plan.

    Args:
      arguments: the program, and arguments that are not flags.

    Returns:
      0 if everything fits, 3 if something does not, 1 for invalid settings.
    """
    make_output_harmless()
    try:
        if len(arguments) > 1:
            raise ValueError(f"{arguments[1]!r} is not a flag; set fields with --config.name=value.")
        if _MEASURE.value:
            return _plan(CONFIG.value, topology_here())
        if _TOPOLOGY.value is None:
            raise ValueError("--topology is missing; set it to v5p:2x2x4, v5e:2x4, h100:8, …")
        jax.config.update("jax_platforms", "cpu")  # JAX must not search for the hardware, which need not be present
        return _plan(CONFIG.value, describe_topology(_TOPOLOGY.value))
    except (ValueError, RuntimeError, OSError, CheckpointError) as error:
        logging.debug("the error's origin", exc_info=True)
        print(f"error: {printable_lines(str(error))}", file=sys.stderr)
        return 1


def _plan(config: ConfigDict, topology: Topology) -> int:
    settings = run_config(config)
    layout = layout_on(topology, settings)
    accounts, meshes, notes, programs = [], _mesh_text("mesh", layout.mesh), [], programs_of(settings, layout)
    for program in programs:
        print(f"compiling {program.phase} {program.name}", file=sys.stderr, flush=True)
        accounts.append(account(program, topology))
        rollout = program.rollout
        if rollout is not None:
            meshes += f", {_mesh_text('rollout', rollout.mesh)}"
            if not tensor_has_fast_links(rollout):
                notes.append(_slow_rollout_note(accounts[-1]))
    if _MEASURE.value:
        accounts = _measured(programs, accounts)
    found, hosts = [], host_accounts(programs, topology)
    if _ADVICE.value and not all(one.fits for one in accounts):
        print("trying out which settings would help", file=sys.stderr, flush=True)
        found = list(advice(config, topology, accounts))
    if _JSON.value:
        plan = as_json(accounts, hosts, topology, notes) | {"advice": [one.as_dict() for one in found]}
        print(json.dumps(plan, indent=2))
    else:
        print(as_table(accounts, hosts, topology, meshes + ".", notes))
        _print_advice(found)
    return 0 if all(one.fits for one in accounts) else DOES_NOT_FIT


def _measured(programs: list[Program], accounts: list[Account]) -> list[Account]:
    """The accounts with measured peaks; programs that fit are run, from the smallest planned peak to the largest."""
    peaks = {}
    for index in sorted(range(len(programs)), key=lambda index: accounts[index].peak):
        if accounts[index].fits:
            print(f"running {programs[index].phase} {programs[index].name}", file=sys.stderr, flush=True)
            peaks[index] = measured_peak(programs[index])
    return [dataclasses.replace(one, measured=peaks.get(index)) for index, one in enumerate(accounts)]


def _slow_rollout_note(rollout: Account) -> str:
    """The note on a rollout in which the devices along `tensor` do not share fast links."""
    decoding = (one for one in rollout.collectives if "decode_" in one.source)
    far = sum(one.count for one in decoding if one.local_group < one.group)
    return (
        f"Note: in sampling `tensor` leaves the machine: {far:,} collectives go over the network, one after the other, "
        "while tokens are sampled. Set a smaller config.rollout_mesh.tensor (or config.mesh.tensor)."
    )


def _mesh_text(name: str, mesh: Mesh) -> str:
    sizes = dict(mesh.shape)
    for axis in ("data", "tensor"):
        sizes[axis] = sizes.get(axis, 1) * sizes.pop(f"fsdp_to_{axis}", 1)
    return f"{name} " + " × ".join(f"{axis} {size}" for axis, size in sizes.items())


def _print_advice(found: list[Advice]) -> None:
    if found:
        print("\nSettings that were tried out, each with those above it:")
    for one in found:
        print(f"  {one}")


def run() -> None:
    """The console command `jax-rlhf-plan`."""
    app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
    run()
