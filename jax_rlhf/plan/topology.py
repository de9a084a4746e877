"""Hardware that need not be there: its devices as the compiler sees them, and what data sheets say of it."""

import contextlib
import dataclasses
import os
from typing import Any

import jax
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental import topologies

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device, by its data sheet.

    Attributes:
      name: as people call it.
      memory: bytes that a program may use.
      flops: bfloat16 matrix products, FLOP/s.
      bandwidth: of its memory, bytes/s.
      link: to its neighbours in the slice or machine (ICI, NVLink), bytes/s each way, all links together.
      network: to other slices or machines, bytes/s each way a device.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    link: float
    network: float


# TPU: cloud.google.com/tpu/docs, memory as the compiler's out-of-memory message has it. H100 SXM: NVIDIA's data sheet,
# memory as XLA's target config has it, times 0.92, XLA_PYTHON_CLIENT_MEM_FRACTION in launch/gpu.sh; a 400 Gbit/s
# network card a GPU.
CHIPS = {
    "v4": Chip("TPU v4", 31.75 * GIB, 275e12, 1.228e12, 300e9, 6.25e9),
    "v5e": Chip("TPU v5e", 15.75 * GIB, 197e12, 0.819e12, 200e9, 3.125e9),
    "v5p": Chip("TPU v5p", 95.74 * GIB, 459e12, 2.765e12, 600e9, 6.25e9),
    "v6e": Chip("TPU v6e", 31.25 * GIB, 918e12, 1.640e12, 448e9, 12.5e9),
    "h100": Chip("NVIDIA H100 SXM", 0.92 * 84_929_347_584, 989e12, 3.352e12, 450e9, 50e9),
}

_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
runtime_version { major: 12 minor: 9 patch: 0 }
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
      name: as given.
      chip: what each is.
      devices: those of all hosts.
      group: devices that links join, a TPU slice or a GPU machine.
    """

    name: str
    chip: Chip
    devices: tuple[Any, ...]
    group: int


def describe_topology(name: str) -> Topology:
    """Devices that programs can be compiled for, without having them.

    Args:
      name: "v5e:2x4", "v5p:2x2x2" …: chips of a TPU slice along each side; "2*v5p:2x2x2": so many slices; "h100:8",
        "h100:4x8": GPUs of a machine, machines × GPUs.

    Returns:
      The topology.

    Raises:
      ValueError: an unknown name, or a shape that there is not.
      RuntimeError: the compiler for that platform is not installed; says what to install.
    """
    count, star, rest = name.partition("*")
    slices, rest = (int(count), rest) if star and count.isdigit() else (1, name)
    kind, _, shape = rest.partition(":")
    sizes = shape.split("x")
    if kind not in CHIPS or slices < 1 or not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise ValueError(
            f'topology {name!r}: "v5p:2x2x4" (chips of a TPU slice), "2*v5p:2x2x4" (two slices), "h100:8" or '
            f'"h100:4x8" (machines × GPUs) is expected; chips: {", ".join(CHIPS)}.'
        )
    if kind == "h100":
        machines, gpus = (1, int(sizes[0])) if len(sizes) == 1 else (int(sizes[0]), int(sizes[1]))
        _assume_h100()
        devices = _devices(name, "cuda", "", target_config=_H100, topology=f"1x{machines}x{gpus}")
        return Topology(name, CHIPS[kind], devices, gpus)
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing is run: another process may have the library
    devices = _devices(name, "tpu", rest, **({"num_slices": slices} if slices > 1 else {}))
    return Topology(name, CHIPS[kind], devices, len(devices) // slices)


def _assume_h100() -> None:
    """Before it traces flash attention, JAX asks what GPU and cuDNN this machine has, which may have neither."""
    fused_attention_stablehlo.check_cudnn_version = lambda: 91200  # both as `_H100` has them
    fused_attention_stablehlo.check_compute_capability = lambda capability: float(capability) <= 9.0
    fused_attention_stablehlo.is_cuda_compute_capability_equal = lambda capability: float(capability) == 9.0


def _devices(asked: str, platform: str, name: str, **options: Any) -> tuple[Any, ...]:
    try:
        with _quiet_libtpu():
            return tuple(topologies.get_topology_desc(platform=platform, topology_name=name, **options).devices)
    except (RuntimeError, NotImplementedError, ValueError, jax.errors.JaxRuntimeError) as error:
        package = {"tpu": "jax[tpu]", "cuda": "jax[cuda12-local]"}[platform]
        missing = "not found" in str(error).lower() or "no attribute" in str(error) or "unknown" in str(error).lower()
        hint = f"pip install '{package}' has the compiler" if missing else "see the vendor's list of slice shapes"
        raise RuntimeError(f"topology {asked}: {error}; {hint}.") from error


@contextlib.contextmanager
def _quiet_libtpu() -> Any:
    """Without a TPU, libtpu looks for one that the environment describes, and reports at length that there is none."""
    defaults = {"TPU_SKIP_MDS_QUERY": "1", "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3"}
    before = {key: os.environ.get(key) for key in defaults}
    os.environ.update({key: value for key, value in defaults.items() if before[key] is None})
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
