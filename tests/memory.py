"""Measures the peak memory of a call."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

_RESET_PEAK = "5"  # man 5 proc_pid_clear_refs


def growth(call: Callable[[], Any]) -> int:
    """Peak memory during the call, minus the memory before it, in bytes."""
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    return int(re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
