"""Hardware that need not be there: its devices as the compiler sees them, and what data sheets say of it."""

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

_CORES_COUNT = ("v4", "v5p", "tpu7x")  # in whose accelerator types Google counts TensorCores, two per chip
_FORMS = (
    '"v5p:2x2x4" (chips of a TPU slice along each side) or "v5p-32" (an accelerator type of Google\'s), "2*v5p:2x2x4" '
    '(two slices), "h100:8" (GPUs of a machine), "h100:4x8" (machines × GPUs)'
)


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
      name: as given.
      chip: what each is.
      devices: those of all hosts.
      group: devices that links join, a TPU slice or a GPU machine.
      link: what a device receives over links at most, bytes/s. In a TPU slice it is less than the chip's: a side of
        length 1 has no links, and one that is no ring has half of them at its ends.
      near: as in `Layout`: `group` of GPUs that are only described, which do not say it themselves.
    """

    name: str
    chip: Chip
    devices: tuple[Any, ...]
    group: int
    link: float
    near: int | None = None


def layout_on(topology: Topology, settings: RunConfig) -> Layout:
    """The layout that a run has on these devices.

    Args:
      topology: the devices.
      settings: the run's.

    Returns:
      The layout.

    Raises:
      ValueError: as in `create_layout`.
    """
    layout = create_layout(settings.mesh, settings.rollout_mesh, topology.devices, near=topology.near)
    assert layout is not None, "devices are given"
    return layout


def describe_topology(name: str) -> Topology:
    """Devices that programs can be compiled for, without having them.

    Args:
      name: "v5e:2x4", "v5p:2x2x2" …: chips of a TPU slice along each side; "v5litepod-8", "v5p-16" …: the same as
        accelerator types; "2*v5p:2x2x2": so many slices; "h100:8", "h100:4x8": GPUs of a machine, machines × GPUs.

    Returns:
      The topology.

    Raises:
      ValueError: an unknown name, or a shape that there is not.
      RuntimeError: the compiler for that platform is not installed; says what to install.
    """
    count, star, rest = name.partition("*")
    slices, rest = (int(count), rest) if star and count.isdigit() else (1, name)
    kind, sizes = _kind_and_sizes(name, rest)
    if slices < 1:
        raise _unknown(name, "no slices")
    if kind in CARDS:
        if star:
            raise _unknown(name, "GPU machines are no slices")
        if len(sizes) > 2:
            raise _unknown(name, "machines × GPUs are two numbers at most")
        machines, gpus = (1, *sizes)[-2:]
        _assume_gpu(CARDS[kind])
        devices = _devices(name, "cuda", "", target_config=CARDS[kind].target(), topology=f"1x{machines}x{gpus}")
        return Topology(name, CHIPS[kind], devices, gpus, CHIPS[kind].link, near=gpus)
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing is run: another process may have the library
    rings = _rings(kind, sizes)
    options: dict[str, Any] = {"wrap": (*rings, False)[:3]}
    if slices > 1:
        options["num_slices"] = slices
    if kind == "v4":
        options["chip_config_name"] = "megacore"  # as on a TPU VM: both cores are one device
    if math.prod(sizes) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    devices = _devices(name, "tpu", f"{kind}:{'x'.join(map(str, sizes))}", **options)
    return Topology(name, CHIPS[kind], devices, len(devices) // slices, _slice_link(CHIPS[kind], sizes, rings))


def _kind_and_sizes(name: str, form: str) -> tuple[str, tuple[int, ...]]:
    """The chip, and chips along each side, or machines and GPUs."""
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
        raise _unknown(name, f"a slice of {chip.name} has {chip.most} chips at most")
    return kind, numbers


def _sides(name: str, kind: str, count: int) -> tuple[int, ...]:
    """The sides of the slice that Google gives for an accelerator type: as near to a cube, or square, as it goes."""
    chip = CHIPS[kind]
    chips = count // 2 if kind in _CORES_COUNT else count
    sides = [2, 2, 1] if chip.axes == 3 else [1, 1]
    while math.prod(sides) < chips:
        shortest = max(axis for axis in range(chip.axes) if sides[axis] == min(sides))
        sides[shortest] *= 2
    odd = kind in _CORES_COUNT and count % 2
    if math.prod(sides) != chips or odd or sides == [1, 2] or chips > chip.most:
        counted = "TensorCores" if kind in _CORES_COUNT else "chips"
        raise _unknown(name, f"there is no slice of {count} {counted} of that name; give its sides")
    return tuple(sides)


def _rings(kind: str, sizes: tuple[int, ...]) -> tuple[bool, ...]:
    """Which sides of a slice close to a ring: of the small ones of v5e and v6e none does, of the others whole cubes do.

    Source: cloud.google.com/tpu/docs/v4, v5e, v5p.
    """
    if CHIPS[kind].axes == 2:
        return tuple(size == 16 for size in sizes)
    return (all(size % 4 == 0 for size in sizes),) * 3


def _slice_link(chip: Chip, sizes: tuple[int, ...], rings: tuple[bool, ...]) -> float:
    each = chip.link / (2 * chip.axes)
    links = sum((2 if ring else 1) for size, ring in zip(sizes, rings, strict=True) if size > 1)
    return each * links if links else chip.link  # one chip: nothing is sent over links


def _unknown(name: str, why: str = "") -> ValueError:
    return ValueError(f"topology {name!r}{f': {why}' if why else ''}; {_FORMS} is expected; chips: {', '.join(CHIPS)}.")


def _assume_gpu(card: Card) -> None:
    """Before it traces flash attention, JAX asks what GPU and cuDNN this machine has, which may have neither."""
    major, minor = card.capability
    has = major + minor / 10
    fused_attention_stablehlo.check_cudnn_version = lambda: 91200  # as `Card.target` has it
    fused_attention_stablehlo.check_compute_capability = lambda capability: float(capability) <= has
    fused_attention_stablehlo.is_cuda_compute_capability_equal = lambda capability: float(capability) == has


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
