"""Simulated hardware: devices for the compiler, with data sheets; the hardware need not be present."""

import contextlib
import dataclasses
import math
import os
from typing import Any

import jax
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental import topologies

from jax_rlhf.config import RunConfig
from jax_rlhf.parallel import Layout, create_layout
from jax_rlhf.plan.chips import CARDS, CHIPS, Card, Chip

_CORES_COUNT = ("v4", "v5p", "tpu7x")  # Google's accelerator types of these count TensorCores, two per chip
_FORMS = (
    '"v5p:2x2x4" (chips of a TPU slice along each side) or "v5p-32" (an accelerator type of Google\'s), "2*v5p:2x2x4" '
    '(two slices), "h100:8" (GPUs of a machine), "h100:4x8" (machines × GPUs)'
)


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices for which programs are compiled.

    Attributes:
      name: as the user wrote it.
      chip: the data sheet of each device.
      devices: the devices of all hosts.
      group: the number of devices that share fast links, a TPU slice or a GPU machine.
      link: the largest rate at which a device receives over links, bytes/s. In a TPU slice it may be less than the
        chip's: a side of length 1 has no links, and chips at the ends of a side that is not a ring have half of them.
      devices_per_machine: as in `Layout`; set for simulated GPUs, which cannot tell their machine themselves.
    """

    name: str
    chip: Chip
    devices: tuple[Any, ...]
    group: int
    link: float
    devices_per_machine: int | None = None


def layout_on(topology: Topology, settings: RunConfig) -> Layout:
    """The layout of a run on these devices.

    Raises:
      ValueError: as in `create_layout`.
    """
    layout = create_layout(
        settings.mesh, settings.rollout_mesh, topology.devices, devices_per_machine=topology.devices_per_machine
    )
    assert layout is not None  # since the devices are given
    return layout


def describe_topology(name: str) -> Topology:
    """Simulated devices for which programs can be compiled.

    Args:
      name: "v5e:2x4", "v5p:2x2x2" …: chips of a TPU slice along each side; "v5litepod-8", "v5p-16" …: accelerator types
        of TPU slices; "2*v5p:2x2x2": two slices; "h100:8": GPUs of a machine; "h100:4x8": machines × GPUs.

    Raises:
      ValueError: the name is unknown, or there is no slice of this shape.
      RuntimeError: the compiler for the platform is not installed; the message says what to install.
    """
    count, star, rest = name.partition("*")
    slices, rest = (int(count), rest) if star and count.isdigit() else (1, name)
    kind, sizes = _kind_and_sizes(name, rest)
    if slices < 1:
        raise _unknown(name, "no slices")
    if kind in CARDS:
        if star:
            raise _unknown(name, "GPU machines have no slices")
        if len(sizes) > 2:
            raise _unknown(name, "machines × GPUs are at most two numbers")
        machines, gpus = (1, *sizes)[-2:]
        _assume_gpu(CARDS[kind])
        devices = _devices(name, "cuda", "", target_config=CARDS[kind].target(), topology=f"1x{machines}x{gpus}")
        return Topology(name, CHIPS[kind], devices, gpus, CHIPS[kind].link, devices_per_machine=gpus)
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing is run, so another process may use the library
    rings = _rings(kind, sizes)
    options: dict[str, Any] = {"wrap": (*rings, False)[:3]}
    if slices > 1:
        options["num_slices"] = slices
    if kind == "v4":
        options["chip_config_name"] = "megacore"  # both cores of a chip are one device, as on a TPU VM
    if math.prod(sizes) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    devices = _devices(name, "tpu", f"{kind}:{'x'.join(map(str, sizes))}", **options)
    return Topology(name, CHIPS[kind], devices, len(devices) // slices, _slice_link(CHIPS[kind], sizes, rings))


def _kind_and_sizes(name: str, form: str) -> tuple[str, tuple[int, ...]]:
    """(kind of chip, chips along each side, or machines and GPUs)."""
    kind, colon, shape = form.partition(":")
    if not colon:
        kind, dash, shape = form.rpartition("-")
        kind = {"v5litepod": "v5e"}.get(kind, kind)
        if not dash or kind not in CHIPS or kind in CARDS or not shape.isdigit():
            raise _unknown(name)
        return kind, _sides(name, kind, int(shape))
    sizes = shape.split("x")
    if kind not in CHIPS or not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise _unknown(name)
    numbers, chip = tuple(map(int, sizes)), CHIPS[kind]
    if chip.axes and len(numbers) != chip.axes:
        raise _unknown(name, f"a slice of {chip.name} has {chip.axes} sides")
    if chip.axes and math.prod(numbers) > chip.most:
        raise _unknown(name, f"a slice of {chip.name} has at most {chip.most} chips")
    return kind, numbers


def _sides(name: str, kind: str, count: int) -> tuple[int, ...]:
    """The sides of the slice of an accelerator type: the closest to a cube, or a square, as Google allocates it."""
    chip = CHIPS[kind]
    chips = count // 2 if kind in _CORES_COUNT else count
    sides = [2, 2, 1] if chip.axes == 3 else [1, 1]
    while math.prod(sides) < chips:
        shortest = max(axis for axis in range(chip.axes) if sides[axis] == min(sides))
        sides[shortest] *= 2
    odd = kind in _CORES_COUNT and count % 2
    if math.prod(sides) != chips or odd or sides == [1, 2] or chips > chip.most:
        counted = "TensorCores" if kind in _CORES_COUNT else "chips"
        raise _unknown(name, f"there is no slice of {count} {counted} of that name; write its sides instead")
    return tuple(sides)


def _rings(kind: str, sizes: tuple[int, ...]) -> tuple[bool, ...]:
    """Which sides of a slice form a ring: sides of 16 chips of v5e and v6e, and all sides of whole 4 × 4 × 4 cubes.

    Source: cloud.google.com/tpu/docs/v4, v5e, v5p.
    """
    if CHIPS[kind].axes == 2:
        return tuple(size == 16 for size in sizes)
    return (all(size % 4 == 0 for size in sizes),) * 3


def _slice_link(chip: Chip, sizes: tuple[int, ...], rings: tuple[bool, ...]) -> float:
    each = chip.link / (2 * chip.axes)
    links = sum((2 if ring else 1) for size, ring in zip(sizes, rings, strict=True) if size > 1)
    return each * links if links else chip.link  # a single chip sends nothing over links


def _unknown(name: str, why: str = "") -> ValueError:
    return ValueError(f"topology {name!r}{f': {why}' if why else ''}; use {_FORMS}. Chips: {', '.join(CHIPS)}.")


def _assume_gpu(card: Card) -> None:
    """Makes JAX assume this card and its cuDNN: before tracing flash attention, it queries the GPU of this machine."""
    major, minor = card.capability
    has = major + minor / 10
    fused_attention_stablehlo.check_cudnn_version = lambda: 91200  # the version in `Card.target`
    fused_attention_stablehlo.check_compute_capability = lambda capability: float(capability) <= has
    fused_attention_stablehlo.is_cuda_compute_capability_equal = lambda capability: float(capability) == has


def _devices(requested: str, platform: str, name: str, **options: Any) -> tuple[Any, ...]:
    try:
        with _quiet_libtpu():
            return tuple(topologies.get_topology_desc(platform=platform, topology_name=name, **options).devices)
    except (RuntimeError, NotImplementedError, ValueError, jax.errors.JaxRuntimeError) as error:
        package = {"tpu": "jax[tpu]", "cuda": "jax[cuda12-local]"}[platform]
        missing = "not found" in str(error).lower() or "no attribute" in str(error) or "unknown" in str(error).lower()
        hint = f"pip install '{package}' has the compiler" if missing else "see the vendor's list of slice shapes"
        raise RuntimeError(f"topology {requested}: {error}; {hint}.") from error


@contextlib.contextmanager
def _quiet_libtpu() -> Any:
    """Silences libtpu, which otherwise searches the environment for a TPU, and logs at length that there is none."""
    defaults = {"TPU_SKIP_MDS_QUERY": "1", "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3"}
    before = {key: os.environ.get(key) for key in defaults}
    os.environ.update({key: value for key, value in defaults.items() if before[key] is None})
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
