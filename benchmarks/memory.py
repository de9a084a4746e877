"""Peak memory. Imports only the standard library, because the torch scripts use it too."""

from pathlib import Path


def peak_gigabytes() -> float:
    """The peak resident memory of this process (Linux: VmHWM), in units of 10⁹ bytes."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / 1e9
