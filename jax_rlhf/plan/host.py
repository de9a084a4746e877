"""Memory that a host needs besides the program itself: offloaded parameters, and state that is written to disk."""

import collections
import dataclasses
from collections.abc import Iterable

import jax

from jax_rlhf.hub.write import MAX_SHARD_BYTES
from jax_rlhf.plan.abstract import Program, device_bytes, shard_bytes
from jax_rlhf.plan.topology import Topology


@dataclasses.dataclass(frozen=True)
class HostAccount:
    """Memory of a phase on one host, in bytes.

    Attributes:
      phase: the phase.
      devices: the number of devices of the host.
      offloaded: offloaded parameters of all its devices.
      checkpoint: trained parameters and optimizer states, copied to the host while they are written in the background.
      file: the largest weight file, which process 0 gathers in memory when it exports a model.
      memory: memory of the host, by the machine types in `chips.py`; NaN = unknown.
    """

    phase: str
    devices: int
    offloaded: float
    checkpoint: float
    file: float
    memory: float

    @property
    def peak(self) -> float:
        """The sum: the last checkpoint of a phase may still be written while its model is exported."""
        return self.offloaded + self.checkpoint + self.file

    @property
    def fits(self) -> bool:
        """Whether the host has enough memory for this; other needs, such as the data, are not counted."""
        return not self.peak > self.memory


def host_accounts(programs: Iterable[Program], topology: Topology) -> list[HostAccount]:
    """The memory that each phase of a run needs on a host.

    Args:
      programs: all programs of the run.
      topology: the devices.
    """
    phases = {program.phase: program for program in programs}
    devices = min(collections.Counter(device.process_index for device in topology.devices).values())
    devices = topology.devices_per_machine or devices  # each GPU of a machine may have a process of its own
    found = []
    for phase, program in phases.items():
        trained = program.resident["parameters"][0]
        state = device_bytes((trained, program.resident["optimizer"]))
        whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(trained))
        found.append(
            HostAccount(
                phase=phase,
                devices=devices,
                offloaded=devices * shard_bytes(program.offloaded),
                checkpoint=devices * state,
                file=float(min(whole, MAX_SHARD_BYTES)),
                memory=devices * topology.chip.host_memory,
            )
        )
    return found
