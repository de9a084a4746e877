"""When numbers go wrong: how long that is borne, what is written down of it, and the mode that looks more closely."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax import Array

from jax_rlhf.config import RunConfig
from jax_rlhf.parallel import barrier, local_rows
from jax_rlhf.runtime.run_logger import Record

T = TypeVar("T")


class FaultError(RuntimeError):
    """Training does not go on like this: updates are not finite, or a limit is passed. The last checkpoint stays."""

    on_all_processes = True  # metrics are the same in all processes


def check_step(config: RunConfig, record: Record, step: int, metrics: Mapping[str, float], batch: Any) -> bool:
    """Looks at what a step's metrics say of it.

    Args:
      config: the run's.
      record: of the phase.
      step: steps done.
      metrics: of the step: "bad_steps" in a row so far, and "limit/…", 1 where one is passed.
      batch: what the step was made from: dataclasses of arrays with a row an entry.

    Returns:
      Whether the step was a good one, fit for a checkpoint.

    Raises:
      FaultError: bad steps in a row, or a passed limit where config.ppo.limits.action="stop".
    """
    bad_steps = int(metrics.get("val/bad_steps", metrics.get("bad_steps", 0)))
    passed = [name for name in ("limit/kl", "limit/ratio") if metrics.get(name)]
    if bad_steps >= config.max_bad_steps:
        why = (
            f"{bad_steps} steps in a row had a loss, gradient or reward that is not finite; their updates were left out"
        )
        mend = "a lower learning rate, data and rewards without such numbers; --config.debug=true says where they arise"
    elif passed and config.ppo.limits.action == "stop":
        numbers = {"limit/kl": "objective/kl", "limit/ratio": "val/largest_ratio_gap"}
        limits = {"limit/kl": config.ppo.limits.kl, "limit/ratio": config.ppo.limits.ratio}
        why = "; ".join(
            f"{numbers[name]}={metrics[numbers[name]]:.4g}, config.ppo.limits.{name.removeprefix('limit/')}="
            f"{limits[name]:g}"
            for name in passed
        )
        mend = (
            "a lower learning rate, a higher config.ppo.kl.coef, fewer ppo_epochs; or config.ppo.limits.action=lower_lr"
        )
    else:
        return not bad_steps
    with barrier("writing the offending batch"):
        file = write_batch(record.folder / "bad_batch", step, batch)
    raise FaultError(
        f"{record.phase}, step {step}: {why}. The batch is in {file}. What may help: {mend}. The same command goes on "
        "from the last checkpoint."
    )


def write_batch(folder: Path, step: int, batch: Any) -> Path:
    """Writes a batch's arrays to look at: `numpy.load(file)`, no pickle.

    Args:
      folder: is made.
      step: of the batch.
      batch: a tree of arrays with a row an entry; each process writes its own rows.

    Returns:
      The file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    part = "" if jax.process_count() == 1 else f".process{jax.process_index()}"
    file = folder / f"step{step}{part}.npz"
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(batch)[0]
    }
    np.savez(file, **{name: local_rows(leaf) if isinstance(leaf, Array) else leaf for name, leaf in leaves.items()})
    return file


def debugged(on: bool, step: Callable[[], T]) -> T:
    """The mode of --config.debug=true: slower, and it stops where something first goes wrong.

    A NaN that a program makes raises FloatingPointError with the place in the code; a transfer between host and devices
    that the code does not ask for is an error; programs run one after the other.

    Args:
      on: whether.
      step: may be called twice.

    Returns:
      What the step does.

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
            step()  # without the guard: JAX looks for the place op by op, and moves constants for that
            raise FloatingPointError(
                "the step had a NaN, and none when it was done again: something is not repeatable."
            )
    finally:
        jax.config.update("jax_cpu_enable_async_dispatch", former)


def _of_nan(error: BaseException | None) -> bool:
    while error is not None:
        if "FloatingPointError" in type(error).__name__:  # JAX's own, which it turns into Python's, is private
            return True
        error = error.__context__
    return False
