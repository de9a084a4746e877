"""Numbers that are not finite: when a run stops, what is written for diagnosis, and the debug mode."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax import Array

from jax_rlhf.parallel import barrier, local_rows
from jax_rlhf.runtime.run_logger import RunLogger

T = TypeVar("T")


class FaultError(RuntimeError):
    """Training stops: updates are not finite, or a limit is exceeded. The last checkpoint stays."""

    on_all_processes = True  # metrics are the same in all processes


class Fault(NamedTuple):
    """Why a run must stop.

    Attributes:
      cause: what happened, with the numbers.
      remedy: settings that may help.
    """

    cause: str
    remedy: str


def check_step(
    logger: RunLogger,
    step: int,
    metrics: Mapping[str, float],
    batch: Any,
    *,
    max_bad_steps: int,
    fault: Fault | None = None,
) -> bool:
    """Stops the run if too many updates in a row were not finite, or after another fault.

    Args:
      logger: the phase's.
      step: steps done.
      metrics: of the step: "bad_steps", updates in a row that were not finite.
      batch: what the step was computed from, a tree of arrays [rows, …]. It is written to <phase>/bad_batch.
      max_bad_steps: bad steps in a row after which the run stops.
      fault: another reason to stop.

    Returns:
      Whether the update was finite, so that a checkpoint may be written.

    Raises:
      FaultError: the run must stop.
    """
    bad_steps = int(metrics.get("val/bad_steps", metrics.get("bad_steps", 0)))
    if bad_steps >= max_bad_steps:
        fault = Fault(
            f"{bad_steps} steps in a row had a loss, gradient or reward that is not finite; their updates were skipped",
            "a lower learning rate, or finite data and rewards; --config.debug=true finds where they arise",
        )
    if fault is None:
        return not bad_steps
    with barrier("writing the offending batch"):
        file = write_batch(logger.folder / "bad_batch", step, batch)
    raise FaultError(
        f"{logger.phase}, step {step}: {fault.cause}. The batch is in {file}. What may help: {fault.remedy}. The same "
        "command continues from the last checkpoint."
    )


def write_batch(folder: Path, step: int, batch: Any) -> Path:
    """Writes a batch's arrays to a file for `numpy.load`, without pickle.

    Args:
      folder: is created.
      step: names the file.
      batch: a tree of arrays [rows, …]; each process writes its own rows.

    Returns:
      The file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    part = "" if jax.process_count() == 1 else f".process{jax.process_index()}"
    file = folder / f"step{step}{part}.npz"
    leaves: dict[str, Any] = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(batch)[0]
    }
    arrays: dict[str, Any] = {
        name: local_rows(leaf) if isinstance(leaf, Array) else leaf for name, leaf in leaves.items()
    }
    np.savez(file, **arrays)
    return file


def debugged(on: bool, step: Callable[[], T]) -> T:
    """Runs a step; with --config.debug=true in a slower mode which raises at the first NaN or implicit transfer.

    A NaN in a program's results raises FloatingPointError with the line of code. An implicit transfer between host and
    devices is an error. Programs run one after the other.

    Args:
      on: the debug mode.
      step: may be called twice.

    Returns:
      The step's result.

    Raises:
      FloatingPointError: a NaN.
      jax.errors.JaxRuntimeError: a transfer.
    """
    if not on:
        return step()
    former = jax.config.read("jax_cpu_enable_async_dispatch")
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        with jax.debug_nans(True):
            try:
                with jax.transfer_guard("disallow"):
                    return step()
            except Exception as error:
                if not _of_nan(error):
                    raise
            step()  # without the transfer guard: to find the NaN, JAX runs op by op, which transfers constants
            raise FloatingPointError(
                "the step had a NaN, but none when it was repeated: some computation is not deterministic."
            )
    finally:
        jax.config.update("jax_cpu_enable_async_dispatch", former)


def _of_nan(error: BaseException | None) -> bool:
    while error is not None:
        if "FloatingPointError" in type(error).__name__:  # JAX's own, which it turns into Python's, is private
            return True
        error = error.__context__
    return False
