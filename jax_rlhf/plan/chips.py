"""Data sheets of accelerators, and descriptions of GPUs for XLA's compiler, for cards that need not be present."""

import dataclasses
from typing import Any

GIB = 2**30
_MEMORY_FRACTION = 0.92  # XLA_PYTHON_CLIENT_MEM_FRACTION in launch/gpu.sh


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device of JAX, by its data sheet.

    Attributes:
      name: the common name.
      memory: bytes that a program may use.
      flops: FLOP/s of bfloat16 matrix products without sparsity.
      bandwidth: of its memory, bytes/s.
      link: bytes/s to its neighbours in the slice or machine (ICI, NVLink), per direction, over all links.
      network: bytes/s to other slices or machines, per direction and device.
      hop: latency of one step of a collective over links, seconds.
      network_hop: latency of one step over the network, seconds; 0 if no figure is published.
      start: latency of a collective before its first step, seconds.
      host_memory: memory of the host, bytes per device.
      axes: dimensions of a TPU slice; 0 for GPUs.
      most: chips of the largest TPU slice; 0 for GPUs.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    link: float
    network: float
    hop: float
    network_hop: float
    start: float
    host_memory: float
    axes: int = 0
    most: int = 0


@dataclasses.dataclass(frozen=True)
class Card:
    """A GPU as XLA's `GpuTargetConfigProto` describes it.

    Attributes:
      name: as the driver reports it.
      capability: compute capability, major and minor.
      cores: streaming multiprocessors.
      units: float32 units per core.
      clock: GHz.
      memory: bytes.
      bandwidth: of the memory, bytes/s.
      cache: L2 cache, bytes.
      shared: shared memory per core, bytes.
      threads: the largest number of threads per core.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    units: int
    clock: float
    memory: int
    bandwidth: int
    cache: int
    shared: int
    threads: int = 2048

    def target(self) -> str:
        """The proto in text format, with CUDA 12.9 and cuDNN 9.12: `target_config` of `get_topology_desc`."""
        major, minor = self.capability
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared}
  threads_per_core_limit: {self.threads}
  core_count: {self.cores}
  fpus_per_core: {self.units}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {self.bandwidth}
  l2_cache_size: {self.cache}
  clock_rate_ghz: {self.clock}
  device_memory_size: {self.memory}
  shared_memory_per_block_optin: {self.shared - 1024}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
device_description_str: "{self.name}"
"""


# From NVIDIA's data sheets and XLA's own descriptions of these cards; for the L4 from NVIDIA's tuning guide.
CARDS = {
    "l4": Card("NVIDIA L4", (8, 9), 58, 128, 2.04, 24_152_899_584, 300_096_000_000, 50_331_648, 102_400, 1536),
    "a100": Card(
        "NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 1.41, 85_100_068_864, 2_039_040_000_000, 41_943_040, 167_936
    ),
    "h100": Card(
        "NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 1.98, 84_929_347_584, 3_352_320_000_000, 52_428_800, 233_472
    ),
    "h200": Card("NVIDIA H200", (9, 0), 132, 128, 1.98, 151_397_597_184, 4_800_000_000_000, 52_428_800, 233_472),
    "b200": Card("NVIDIA B200", (10, 0), 148, 128, 1.965, 191_514_411_008, 7_672_320_000_000, 132_644_864, 233_472),
}


def _gpu(name: str, kind: str, flops: float, link: float, network: float, host: float, *, hop: float = 0.47e-6) -> Chip:
    card = CARDS[kind]
    nccl: dict[str, Any] = {"network_hop": 2.7e-6, "start": 3.6e-6}
    return Chip(
        name, _MEMORY_FRACTION * card.memory, flops, card.bandwidth, link, network, hop=hop, host_memory=host, **nccl
    )


def _tpu(*sheet: Any, host: float, axes: int, most: int) -> Chip:
    return Chip(*sheet, hop=1e-6, network_hop=0.0, start=0.0, host_memory=host, axes=axes, most=most)


# TPU: cloud.google.com/tpu/docs; memory from the compiler's out-of-memory message; 1 µs per hop from "How to Scale Your
# Model" (Austin et al. 2025). GPU: NVLink (PCIe for the L4); network of NVIDIA's machines with eight cards (Google's
# g2-standard-96 for the L4); latencies from NCCL's model of a ring with the LL protocol (src/graph/tuning.cc). Host
# memory: Google's machine types with 4 TPU chips (TPU7x: 8 devices) or 8 GPUs.
CHIPS = {
    "v4": _tpu("TPU v4", 30.75 * GIB, 275e12, 1.228e12, 300e9, 6.25e9, host=407e9 / 4, axes=3, most=4096),
    "v5e": _tpu("TPU v5e", 15.75 * GIB, 197e12, 0.819e12, 200e9, 3.125e9, host=192e9 / 4, axes=2, most=256),
    "v5p": _tpu("TPU v5p", 95.74 * GIB, 459e12, 2.765e12, 600e9, 6.25e9, host=448e9 / 4, axes=3, most=8960),
    "v6e": _tpu("TPU v6e", 31.25 * GIB, 918e12, 1.638e12, 400e9, 12.5e9, host=720e9 / 4, axes=2, most=256),
    # Two devices per chip, which share its links and its network.
    "tpu7x": _tpu("TPU7x", 94.75 * GIB, 1153.5e12, 3.69e12, 300e9, 6.25e9, host=960e9 / 8, axes=3, most=9216),
    "l4": _gpu("NVIDIA L4", "l4", 121e12, 32e9, 1.56e9, 384e9 / 8, hop=1.0e-6),
    "a100": _gpu("NVIDIA A100 SXM 80 GB", "a100", 312e12, 300e9, 25e9, 1360e9 / 8),
    "h100": _gpu("NVIDIA H100 SXM", "h100", 989e12, 450e9, 50e9, 1872e9 / 8),
    "h200": _gpu("NVIDIA H200 SXM", "h200", 989e12, 450e9, 50e9, 2952e9 / 8),
    "b200": _gpu("NVIDIA B200", "b200", 2250e12, 900e9, 50e9, 3968e9 / 8),
}
