"""`python -m jax_rlhf.verify WORKDIR`: checks the integrity of every checkpoint and model of a run.

A checkpoint is whole if each of its arrays has the checksum with which it was written. A model is whole if each of its
files has the digest in the phase's manifest. Nothing is changed.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from absl import app, logging

from jax_rlhf.data.config import PHASES
from jax_rlhf.io.json_files import JSONFileError, read_object
from jax_rlhf.io.printable import printable
from jax_rlhf.io.terminal import make_output_harmless
from jax_rlhf.runtime import manifest
from jax_rlhf.runtime.completeness import checkpoint_damage
from jax_rlhf.runtime.manifest import ManifestError, check_model
from jax_rlhf.runtime.remote import checkpoints_of, open_workdir_at
from jax_rlhf.runtime.workdir import is_locked, status

_LINES = ("metrics.jsonl", "samples.jsonl")


def verify(workdir: Path) -> Iterator[tuple[str, str]]:
    """Checks all files, checkpoints and models of a run.

    Args:
      workdir: the run's folder.

    Yields:
      (name, problem); the problem is "" if the file, checkpoint or model is whole.

    Raises:
      FileNotFoundError: the folder is not a run's workdir.
    """
    phases = [phase for phase in PHASES if (workdir / phase).is_dir()]
    if not phases:
        raise FileNotFoundError(f"{workdir} is not the workdir of a run: it has none of {', '.join(PHASES)}.")
    yield "config.json", _of_object(workdir / "config.json")
    for phase in phases:
        folder = workdir / phase
        yield f"{phase}/{manifest.NAME}", _of_manifest(folder)
        if (folder / "summary.json").exists():
            yield f"{phase}/summary.json", _of_object(folder / "summary.json")
        for name in _LINES:
            if (folder / name).exists():
                yield f"{phase}/{name}", _of_lines(folder / name)
        checkpoints = checkpoints_of(folder)
        steps = (
            [int(path.name) for path in checkpoints.iterdir() if path.name.isdigit()] if checkpoints.is_dir() else []
        )
        for step in sorted(steps):
            problem = checkpoint_damage(checkpoints / str(step))
            if not problem or (checkpoints / str(step)).exists():  # an active run deletes older checkpoints
                yield f"{phase}/checkpoints/{step}", problem
        yield from _of_models(folder, finished=status(workdir, phase) == "finished")


def _of_models(folder: Path, *, finished: bool) -> Iterator[tuple[str, str]]:
    try:
        models = set(manifest.listed_models(folder))
    except ManifestError:  # already reported for the manifest itself
        return
    if not (folder / manifest.NAME).exists():
        return
    models |= {name for name in manifest.MODELS if (folder / name).is_dir()}
    for name in sorted(models | ({"model"} if finished else set())):
        try:
            check_model(folder / name)
            yield f"{folder.name}/{name}", ""
        except (ManifestError, OSError) as error:
            yield f"{folder.name}/{name}", str(error)


def _of_manifest(folder: Path) -> str:
    if not (folder / manifest.NAME).exists():
        return "it is missing"
    try:
        manifest.listed_models(folder)
    except ManifestError as error:
        return str(error)
    return ""


def _of_object(file: Path) -> str:
    try:
        read_object(file)
    except (JSONFileError, OSError) as error:
        return str(error)
    return ""


def _of_lines(file: Path) -> str:
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    whole = line.endswith(b"\n") and isinstance(json.loads(line), dict)
                except (ValueError, RecursionError):
                    whole = False
                if not whole:
                    return f"line {number} is not a whole JSON object"
    except OSError as error:
        return str(error)
    return ""


def main(arguments: Sequence[str]) -> int:
    """Prints a line per file, checkpoint and model.

    Args:
      arguments: the program and the workdir.

    Returns:
      The exit code: 0 if everything is whole, 1 if something is damaged, 2 if the workdir could not be checked.
    """
    make_output_harmless()
    if len(arguments) != 2:
        print("usage: python -m jax_rlhf.verify WORKDIR", file=sys.stderr)
        return 2
    logging.set_verbosity(logging.ERROR)  # damage is reported below
    jax.config.update("jax_platforms", "cpu")
    damaged = count = 0
    try:
        workdir, _lock = open_workdir_at(arguments[1])
        if is_locked(workdir):
            print("a run is active in this workdir: files that it is writing may be incomplete.")
        for name, problem in verify(workdir):
            count, damaged = count + 1, damaged + bool(problem)
            print(
                f"{'DAMAGED' if problem else 'whole  '}  {name}{f': {printable(problem, 400)}' if problem else ''}",
                flush=True,
            )
    except (ValueError, OSError) as error:
        print(f"error: {printable(str(error), 400)}", file=sys.stderr)
        return 2
    print(f"{count - damaged} of {count} are whole.")
    return 1 if damaged else 0


def run() -> None:
    """The command `jax-rlhf verify WORKDIR`."""
    app.run(main)


if __name__ == "__main__":
    run()
