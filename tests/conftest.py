"""Eight simulated devices for all tests, configured before JAX starts."""

import gc
import os
from collections.abc import Iterator

from tests.processes import COMPILED, XLA_FLAGS

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests do not use the network
# Compiling takes most of the time, and 40% less without LLVM's expensive passes. Subprocesses inherit the setting.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Without spaces at the ends, because XLA takes a single space for the name of a file.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {XLA_FLAGS}".strip()
# XLA:CPU's collectives block threads of one pool. With only as many threads as devices they can deadlock, which half of
# the runs with eight devices on two busy cores did.
os.environ.setdefault("PJRT_NPROC", "32")

import jax
import pytest

from tests import checked_types

checked_types.install()  # before anything imports the package

jax.config.update("jax_num_cpu_devices", 8)
# Many modules compile the same small programs. The cache shares them, also with the processes that tests start.
jax.config.update("jax_compilation_cache_dir", str(COMPILED))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture(scope="module", autouse=True)
def _unload_programs() -> Iterator[None]:
    """Unloads compiled programs after each module.

    Each program has dozens of memory maps, and Linux allows 65,530 per process (vm.max_map_count). Beyond that XLA's
    compiler crashes with a segmentation fault, which happened after 500 tests.
    """
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="module")
def full_compile() -> Iterator[None]:
    """Switches on all passes of the compiler, for modules that examine its output."""
    former = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", former)


LONGEST = ("tests/test_on_device.py", "tests/plan/test_command.py", "tests/cli/test_processes.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first, so that pytest's processes end at about the same time."""
    first = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: first.get(item.nodeid.partition("::")[0], len(first)))
