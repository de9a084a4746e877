"""Runs the tests on each wrong variant and says which of them they let pass.

    python -m tests.mutants                  all lists of this folder
    python -m tests.mutants -k data          those whose list, file or text has "data" in it
    python -m tests.mutants --jobs 4         four at a time

The working tree is copied, and left as it is. The exit code is 1 where a variant survives or cannot be made.
"""

import argparse
import concurrent.futures
import functools
import importlib
import os
import pkgutil
import queue
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tests.mutants
from tests.mutants import Mutant

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("jax_rlhf", "tests", "configs", "examples", "docs", "pyproject.toml", "README.md")
LONGEST = 400  # seconds; a variant that never ends is found
MEMORY = 12_000_000_000  # bytes of address space; one that takes all of the machine's is found


def listed(word: str) -> list[tuple[str, Mutant]]:
    """(list, mutant) of all whose description has the word."""
    names = [module.name for module in pkgutil.iter_modules(tests.mutants.__path__)]
    lists = {
        name: importlib.import_module(f"tests.mutants.{name}").MUTANTS
        for name in names
        if name != "__main__" and not name.startswith("test_")
    }
    return [(name, mutant) for name, mutants in lists.items() for mutant in mutants if word in f"{name} {mutant}"]


def exit_code(tests_named: str, copy: Path) -> int:
    """What pytest ends with in a copy of the tree; 1 where it does not end."""
    # Programs that a variant does not touch come from the cache in tests/conftest.py.
    ours = {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *shlex.split(tests_named)]
    try:
        return subprocess.run(
            command, cwd=copy, env=os.environ | ours, capture_output=True, timeout=LONGEST, preexec_fn=_limit
        ).returncode
    except subprocess.TimeoutExpired:
        return 1


def _limit() -> None:
    # A test that sets a higher limit for itself may.
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))


def verdict(mutant: Mutant, copy: Path) -> str:
    """What the tests say of it, in a copy of the tree that is whole again afterwards."""
    file = copy / mutant.file
    whole = file.read_text()
    if whole.count(mutant.old) != 1:
        return f"NOT MADE: the old text stands there {whole.count(mutant.old)} times"
    file.write_text(whole.replace(mutant.old, mutant.new))
    try:
        code = exit_code(mutant.tests, copy)
    finally:
        file.write_text(whole)
    ended = code in (1, 2) or code < 0  # by a signal: of all the memory that it may take
    return "KILLED" if ended else "SURVIVED" if code == 0 else f"NOT RUN: pytest ended with {code}"


def main() -> int:
    """Runs all that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-k", default="", metavar="WORD", help="only those with this in list, file or text")
    parser.add_argument("--jobs", type=int, default=1, help="so many at a time")
    arguments = parser.parse_args()
    found, counts = listed(arguments.k), {"KILLED": 0, "SURVIVED": 0, "NOT": 0}
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies: queue.SimpleQueue = queue.SimpleQueue()
        for index in range(arguments.jobs):
            copy = Path(folder) / str(index)
            for name in COPIED:
                put = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
                copy.mkdir(exist_ok=True)
                put(ROOT / name, copy / name)
            copies.put(copy)

        def in_a_copy(run: Callable[[Any, Path], Any], what: Any) -> tuple[Any, float]:
            copy, started = copies.get(), time.perf_counter()
            try:
                return run(what, copy), time.perf_counter() - started
            finally:
                copies.put(copy)

        with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
            named = list(dict.fromkeys(mutant.tests for _, mutant in found))
            codes = [code for code, _ in pool.map(functools.partial(in_a_copy, exit_code), named)]
            if any(codes):
                failed = [f"{code}: {tests}" for code, tests in zip(codes, named, strict=True) if code]
                print("without any change pytest ends with", *failed, sep="\n")
                return 1
            verdicts = pool.map(functools.partial(in_a_copy, verdict), [mutant for _, mutant in found])
            for (name, mutant), (said, seconds) in zip(found, verdicts, strict=True):
                counts[said.partition(" ")[0]] += 1
                print(f"{said}  {name}  {mutant}  ({seconds:.0f} s)", flush=True)
    print(f"{len(found)} variants: {counts['KILLED']} killed, {counts['SURVIVED']} survived, {counts['NOT']} not run")
    return int(counts["SURVIVED"] + counts["NOT"] > 0 or not found)


if __name__ == "__main__":
    sys.exit(main())
