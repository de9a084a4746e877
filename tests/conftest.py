"""Eight simulated devices for every test; set before JAX starts."""

import gc
import os
from collections.abc import Iterator

from tests.processes import COMPILED, XLA_FLAGS

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a hub
# Compiling takes most of the time; without LLVM's dear passes it takes three fifths of it. For started programs too.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Without blanks at either end: XLA takes a blank alone for the name of a file.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {XLA_FLAGS}".strip()
# XLA:CPU's collectives wait in the threads of one pool. With as many threads as devices they can all wait at once, each
# for one that has no thread: seen in half of the runs of eight devices on two busy cores.
os.environ.setdefault("PJRT_NPROC", "32")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
# Modules compile the same programs, most of them small: once for all of them, and for the processes that tests start.
jax.config.update("jax_compilation_cache_dir", str(COMPILED))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture(scope="module", autouse=True)
def _unload_programs() -> Iterator[None]:
    """Unloads compiled programs after each module.

    Each holds dozens of memory maps, of which Linux gives a process 65,530 (vm.max_map_count): past that XLA's compiler
    dies of a segmentation fault, as it did after 500 tests.
    """
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="module")
def full_compile() -> Iterator[None]:
    """For modules that look at what the compiler makes: with all its passes."""
    former = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", former)


LONGEST = ("tests/test_on_device.py", "tests/plan/test_command.py", "tests/cli/test_processes.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: of two processes that take files in turn, one would wait for the other's last."""
    first = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: first.get(item.nodeid.partition("::")[0], len(first)))
