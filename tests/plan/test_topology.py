"""Names of hardware in the vendors' forms. An unknown name is an error before anything is compiled."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from jax_rlhf.plan.chips import CARDS, CHIPS
from jax_rlhf.plan.topology import describe_topology
from tests.plan import tiny


@pytest.mark.parametrize(
    ("name", "devices", "group"),
    [
        ("v5e:2x4", 8, 8),
        ("v5e:1x1", 1, 1),
        ("2*v5e:2x2", 8, 4),
        ("v4:2x2x1", 4, 4),  # the two cores of a chip are one device
        ("v5p:2x2x2", 8, 8),
        ("v6e:4x4", 16, 16),
        ("tpu7x:2x2x1", 8, 8),  # two devices per chip
        ("v5litepod-8", 8, 8),
        ("v5e-1", 1, 1),
        ("v6e-16", 16, 16),
        ("v4-8", 4, 4),
        ("v5p-16", 8, 8),
        ("2*v5p-8", 8, 4),
        ("tpu7x-16", 16, 16),
        ("h100:8", 8, 8),
        ("h100:4x8", 32, 8),
        ("a100:8", 8, 8),
        ("h200:1", 1, 1),
        ("b200:2x8", 16, 8),
        ("l4:4", 4, 4),
    ],
)
def test_a_topology_has_devices_and_a_group_with_fast_links(name, devices, group):
    topology = tiny.topology(name)
    assert (len(topology.devices), topology.group) == (devices, group)
    assert topology.chip is CHIPS[name.split("*")[-1].replace("litepod", "e").partition(":")[0].partition("-")[0]]


@pytest.mark.parametrize(
    ("name", "sides"),
    [
        ("v5p-8", "2, 2, 1"),
        ("v5p-32", "2, 2, 4"),
        ("v4-64", "2, 4, 4"),
        ("v5p-256", "4, 4, 8"),
        ("v5litepod-32", "4, 8"),
        ("v6e-64", "8, 8"),
    ],
)
def test_an_accelerator_type_has_the_sides_that_google_documents(name, sides):
    """The expected sides are from the tables of cloud.google.com/tpu/docs."""
    sides = [int(side) for side in sides.split(", ")]
    coordinates = [device.coords for device in tiny.topology(name).devices]
    assert [max(along) + 1 for along in zip(*coordinates, strict=True)][: len(sides)] == sides


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("h100:2x2x8", "at most two numbers"),
        ("2*h100:4", "no slices"),
        ("0*v5p:2x2x2", "no slices"),
        ("h100:0", 'use "v5p:2x2x4"'),
        ("h100", 'use "v5p:2x2x4"'),
        ("h100-8", 'use "v5p:2x2x4"'),
        ("v5p", 'use "v5p:2x2x4"'),
        ("v5p:", 'use "v5p:2x2x4"'),
        ("v5p:2x2", "3 sides"),
        ("v5e:2x4x1", "2 sides"),
        ("v5e:32x32", "at most 256 chips"),
        ("v5litepod-6", "no slice of 6 chips"),
        ("v5litepod-2", "no slice of 2 chips"),
        ("v5litepod-512", "no slice of 512 chips"),
        ("v5p-9", "no slice of 9 TensorCores"),
        ("v5p-24", "no slice of 24 TensorCores"),
        ("v5p-0", "no slice of 0"),
        ("v5p--8", 'use "v5p:2x2x4"'),
        ("tpu:4", 'use "v5p:2x2x4"'),
        ("v9:2x2", "Chips: v4, v5e"),
        ("h100:x", 'use "v5p:2x2x4"'),
        ("v5p:2x2x", 'use "v5p:2x2x4"'),
        ("v3-8", 'use "v5p:2x2x4"'),
        ("a*v5p:2x2x2", 'use "v5p:2x2x4"'),
        ("", 'use "v5p:2x2x4"'),
    ],
)
def test_an_unknown_topology_is_an_error_that_shows_valid_names(name, why):
    with pytest.raises(ValueError, match=why) as caught:
        describe_topology(name)
    assert "h100:4x8" in str(caught.value)


def test_the_link_rate_is_that_of_a_device_at_the_end_of_a_slice():
    assert tiny.topology("v5p:2x2x2").link == CHIPS["v5p"].link / 2  # no side is a ring
    assert tiny.topology("v5p:2x2x1").link == CHIPS["v5p"].link / 3
    assert tiny.topology("v5p:4x4x4").link == CHIPS["v5p"].link
    assert tiny.topology("v5e:2x4").link == CHIPS["v5e"].link / 2
    assert tiny.topology("v5e:8x16").link == CHIPS["v5e"].link * 3 / 4
    assert tiny.topology("h100:8").link == CHIPS["h100"].link


@pytest.mark.parametrize("kind", [*CARDS])
def test_a_program_compiles_for_each_gpu(kind):
    device = tiny.topology(f"{kind}:1").devices[0]
    matrix = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=SingleDeviceSharding(device))
    compiled = jax.jit(lambda x: jax.nn.softmax(x @ x)).lower(matrix).compile()
    assert device.device_kind == CARDS[kind].name
    assert compiled.memory_analysis().output_size_in_bytes == 2 * 256**2
