"""Lower bounds of a program's time: each resource by itself, at the rate of the data sheet."""

import math

from jax_rlhf.plan.collectives import Collective
from jax_rlhf.plan.topology import Topology


def bounds(flops: float, traffic: float, sent: tuple[Collective, ...], topology: Topology) -> dict[str, float]:
    """The least time of a call, by what bounds it.

    Args:
      flops: of matrix products, of a device.
      traffic: bytes of kernels and cache that decoding reads.
      sent: the program's collectives.
      topology: the devices.

    Returns:
      Seconds: "products", "memory", "links" and "network" (bytes at their rates), "latency" (`latency` of all).
    """
    chip = topology.chip
    found = {"products": flops / chip.flops, "memory": traffic / chip.bandwidth, "links": 0.0, "network": 0.0}
    for one in sent:
        size = one.count * one.bytes
        if one.near > 1:
            found["links"] += size / topology.link
        if one.near < one.group:  # what comes over the network, the near ones share; links carry it on
            found["network"] += size / one.near / chip.network
    return found | {"latency": sum(one.count * latency(one, topology) for one in sent)}


def latency(one: Collective, topology: Topology) -> float:
    """What a collective takes however little it sends.

    NCCL's rings take n − 1 steps over n devices, of which those between m machines, m − 1, go over the network. On a
    TPU slice at least log₂ n hops lie between the ends of a torus. An all-reduce takes twice that, a permutation one
    step.

    Args:
      one: the collective.
      topology: the devices.

    Returns:
      Seconds.
    """
    chip, passes = topology.chip, 2 if one.kind == "all-reduce" else 1
    far = math.ceil(one.group / one.near) - 1
    near = math.log2(one.near) if chip.axes else one.group - 1 - far
    if one.kind == "collective-permute":
        near, far = (1, 0) if one.near == one.group else (0, 1)
    return chip.start + passes * (near * chip.hop + far * chip.network_hop)
