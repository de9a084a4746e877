"""Peak memory; imports nothing, since the torch scripts use it too."""

from pathlib import Path


def peak_gigabytes() -> float:
    """The most memory that this process has had resident (Linux: VmHWM), in units of 10⁹ bytes."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / 1e9
