"""Checks and benchmarks of this package on one device, in eight minutes. Prints JSON lines; exits with 1 on a failure.

    python -m benchmarks.on_device                       # all parts; docs/device.md says what a bare machine needs
    python -m benchmarks.on_device --parts=numbers,flash
    python -m benchmarks.on_device --tiny                # small sizes on a CPU, to test the script itself

Every part runs in its own process with a time limit, so a crash or a hang affects only that part. A row is printed as
soon as it is known. Rows with "ok" are checks, the other rows are figures. The last row of a part says how it ended.
The last row of all lists the failures.
"""

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

# Part → time limit in seconds; the most informative parts run first.
LIMITS = {
    "env": 60,
    "numbers": 90,
    "flash": 100,
    "decode": 150,
    "ppo": 150,
    "memory": 150,
    "resume": 120,
    "offload": 80,
    "decode_captured": 60,
    "quickstart": 300,
}
MODULES = {
    "numbers": ("env", "numbers"),
    "flash": ("flash",),
    "decode": ("decode", "decode_captured"),
    "ppo": ("ppo", "offload", "iterations_on_device", "iterations_offloaded"),
    "runs": ("memory", "resume", "quickstart"),
}
_CAPTURED = "--xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,CONDITIONAL,WHILE"


def run_part(name: str, limit: float, *, tiny: bool) -> list[str]:
    """Runs a part in its own process, and prints its rows.

    Args:
      name: the part.
      limit: time limit in seconds.
      tiny: use sizes for a CPU.

    Returns:
      The failures: rows whose check did not pass, and the part itself if it crashed or hit its limit.
    """
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.on_device", f"--child={name}", *["--tiny"] * tiny]
    environment, start, failed = dict(os.environ), time.perf_counter(), []
    environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # as the launch scripts set it
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms and "cpu" not in platforms.split(","):
        environment["JAX_PLATFORMS"] = f"{platforms},cpu"  # part `numbers` compares with it
    if name == "decode_captured" and not tiny:
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {_CAPTURED}"
    # In a new session, so that its children are killed too at the limit.
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
    code: int | str = "time limit"
    with _ended_after(process, limit) as ended:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            failed += _failures(name, line)
        if process.wait() is not None and not ended:
            code = process.returncode
    if code != 0:
        failed.append(f"{name}: {code}")
    print_row({"part": name, "ended": code, "seconds": round(time.perf_counter() - start, 1)})
    return failed


@contextlib.contextmanager
def _ended_after(process: subprocess.Popen, limit: float) -> Any:
    """Kills the process and its children after `limit` seconds, and kills remaining children at the end.

    Yields a list that is not empty once the limit has passed.
    """
    ended: list[float] = []

    def kill() -> None:
        with contextlib.suppress(ProcessLookupError):  # all have ended already
            os.killpg(process.pid, signal.SIGKILL)

    def end() -> None:
        ended.append(limit)
        kill()

    timer = threading.Timer(limit, end)
    timer.start()
    try:
        yield ended
    finally:
        timer.cancel()
        kill()  # remaining children, or the process itself if this program is interrupted


def _failures(name: str, line: str) -> list[str]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:  # not a row
        return []
    if not isinstance(row, dict) or row.get("ok") is not False:
        return []
    what = row.get("case") or row.get("program") or row.get("dtype") or row.get("attention") or ""
    return [f"{name} {what}".strip()]


def print_row(row: dict[str, Any]) -> None:
    """Prints a row."""
    print(json.dumps(row), flush=True)


def run_child(name: str, *, tiny: bool) -> None:
    """Runs a part in this process.

    Args:
      name: the part.
      tiny: use sizes for a CPU.
    """
    module = next(module for module, parts in MODULES.items() if name in parts)
    getattr(importlib.import_module(f"benchmarks.device.{module}"), name)(tiny)


def main() -> int:
    """Parses arguments, runs the parts.

    Returns:
      1 if a check failed, a part crashed, or there was no time left for a part; else 0.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="use sizes for a CPU")
    parser.add_argument("--parts", default=",".join(LIMITS), help="parts to run, separated by commas")
    parser.add_argument("--budget", type=float, default=470, help="seconds for all parts")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run_child(arguments.child, tiny=arguments.tiny)
        return 0
    unknown = set(arguments.parts.split(",")) - LIMITS.keys()
    if unknown:
        parser.error(f"--parts: {', '.join(sorted(unknown))}; there are {', '.join(LIMITS)}")
    start, failed = time.perf_counter(), []
    for name in arguments.parts.split(","):
        left = arguments.budget - (time.perf_counter() - start)
        if left < 15:
            print_row({"part": name, "ended": "not run: no time was left"})
            failed.append(f"{name}: not run")
        else:
            failed += run_part(name, min(LIMITS[name], left), tiny=arguments.tiny)
    print_row({"part": "all", "failed": failed, "seconds": round(time.perf_counter() - start, 1)})
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
