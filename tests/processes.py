"""Runs programs in new processes, for tests of peak memory, of killed processes, and of several hosts."""

import os
import socket
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHONPATH = os.pathsep.join((str(ROOT / "tests" / "without_torch"), str(ROOT)))
"""For processes that tests start: they can import this repository, but not torch."""
COMPILED = Path(tempfile.gettempdir()) / f"jax_rlhf-tests-{os.getuid()}"
"""The compilation cache of all tests."""


_OLD = version("jaxlib").startswith("0.10.")  # 0.11 has no such flags
XLA_FLAGS = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1" if _OLD else ""
"""With these flags tiny programs compile in a third of the time on CPU, since LLVM does not split them into 32 parts.
They run slower, which does not matter for tiny programs."""


def flags_for(devices: int) -> str:
    """XLA's flags for a process with a number of simulated devices."""
    return f"--xla_force_host_platform_device_count={devices} {XLA_FLAGS}".strip()


def start(program: str, *arguments: object, devices: int = 1) -> subprocess.Popen:
    """Starts a Python program on simulated devices, with this repository importable."""
    environment = os.environ | {
        "PYTHONPATH": PYTHONPATH,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags_for(devices),
        "PJRT_NPROC": str(4 * devices),  # see conftest.py
    }
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def finish(process: subprocess.Popen, timeout: float = 300) -> str:
    """Waits for a program, asserts that it succeeds, and returns its output."""
    output, errors = process.communicate(timeout=timeout)
    assert process.returncode == 0, errors[-4000:]
    return output


def free_port() -> int:
    """A free port of this machine."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
