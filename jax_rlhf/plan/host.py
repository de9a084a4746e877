"""What a host needs memory for beside the program itself: offloaded parameters, and state on its way to a disk."""

import collections
import dataclasses
from collections.abc import Iterable

import jax

from jax_rlhf.hub.write import MAX_SHARD_BYTES
from jax_rlhf.plan.abstract import Program, device_bytes, shard_bytes
from jax_rlhf.plan.topology import Topology


@dataclasses.dataclass(frozen=True)
class HostAccount:
    """A phase on one host; all in bytes.

    Attributes:
      phase: which.
      devices: of the host.
      offloaded: parameters that wait there, of all its devices.
      checkpoint: trained parameters and optimizer states, copied there while they are written in the background.
      file: of a model that process 0 exports, which is put together there, at most.
      memory: that the host has, of the machine types in `chips.py`; NaN = not known.
    """

    phase: str
    devices: int
    offloaded: float
    checkpoint: float
    file: float
    memory: float

    @property
    def peak(self) -> float:
        """All at once: the last checkpoint of a phase may still be written while its model is exported."""
        return self.offloaded + self.checkpoint + self.file

    @property
    def fits(self) -> bool:
        """Whether the host has the memory; what else it needs, such as the data, comes on top."""
        return not self.peak > self.memory


def host_accounts(programs: Iterable[Program], topology: Topology) -> list[HostAccount]:
    """What each phase of a run needs of a host's memory.

    Args:
      programs: of the run.
      topology: the devices.

    Returns:
      One per phase.
    """
    phases = {program.phase: program for program in programs}
    devices = min(collections.Counter(device.process_index for device in topology.devices).values())
    devices = topology.devices_per_machine or devices  # GPUs of a machine may have a process each
    found = []
    for phase, program in phases.items():
        trained = program.resident["parameters"][0]
        state = device_bytes((trained, program.resident["optimizer"]))
        whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(trained))
        found.append(
            HostAccount(
                phase=phase,
                devices=devices,
                offloaded=devices * shard_bytes(program.waiting),
                checkpoint=devices * state,
                file=float(min(whole, MAX_SHARD_BYTES)),
                memory=devices * topology.chip.host_memory,
            )
        )
    return found
