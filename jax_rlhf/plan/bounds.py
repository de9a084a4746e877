"""Lower bounds of a program's time, one per resource, from the rates in data sheets."""

import math

from jax_rlhf.plan.collectives import Collective
from jax_rlhf.plan.topology import Topology


def bounds(flops: float, traffic: float, sent: tuple[Collective, ...], topology: Topology) -> dict[str, float]:
    """Lower bounds of the duration of a call, by resource.

    Args:
      flops: of matrix products, per device.
      traffic: bytes of kernels and KV cache that decoding reads, per device.
      sent: the program's collectives.
      topology: the devices.

    Returns:
      Seconds: "products", "memory", "links" and "network" (amounts divided by rates), and "latency" (the sum of
      `latency` over all collectives).
    """
    chip = topology.chip
    found = {"products": flops / chip.flops, "memory": traffic / chip.bandwidth, "links": 0.0, "network": 0.0}
    for one in sent:
        size = one.count * one.bytes
        if one.local_group > 1:
            found["links"] += size / topology.link
        # Each device of a machine receives a part of the data over the network; links distribute it within the machine.
        if one.local_group < one.group:
            found["network"] += size / one.local_group / chip.network
    return found | {"latency": sum(one.count * latency(one, topology) for one in sent)}


def latency(one: Collective, topology: Topology) -> float:
    """The latency of a collective in seconds, independent of the amount of data.

    NCCL's rings need n − 1 steps over n devices; m − 1 of these steps, between m machines, go over the network. On a
    TPU slice there are at least log₂ n hops between the ends of a torus. An all-reduce needs twice as many steps, and a
    permutation one.
    """
    chip, passes = topology.chip, 2 if one.kind == "all-reduce" else 1
    far = math.ceil(one.group / one.local_group) - 1
    near = math.log2(one.local_group) if chip.axes else one.group - 1 - far
    if one.kind == "collective-permute":
        near, far = (1, 0) if one.local_group == one.group else (0, 1)
    return chip.start + passes * (near * chip.hop + far * chip.network_hop)
