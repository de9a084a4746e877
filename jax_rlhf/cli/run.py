"""`python -m jax_rlhf --config=FILE [--config.a.b=value …] --workdir=DIR`: runs the phases that the config names."""

import hashlib
import sys
import threading
import traceback
from collections.abc import Sequence
from logging import getLogger
from pathlib import Path
from types import TracebackType

import jax
from absl import app, logging
from filelock import BaseFileLock
from ml_collections import ConfigDict

from jax_rlhf.cli.flags import CONFIG, parse_flags
from jax_rlhf.cli.model_paths import check_inputs
from jax_rlhf.cli.open_workdir import forget_failed_start, forget_overwritten, open_workdir, overwritten
from jax_rlhf.cli.phases import run_phase
from jax_rlhf.cli.preflight import check_run
from jax_rlhf.cli.run_flags import (
    ACCEPT_CHANGES,
    CHECK,
    COMPILE_CACHE,
    COORDINATOR,
    NUM_PROCESSES,
    OVERWRITE,
    PROCESS_ID,
    PROCESS_TIMEOUT,
    WORKDIR,
)
from jax_rlhf.cli.summary import closing
from jax_rlhf.config import run_config
from jax_rlhf.data import DataError
from jax_rlhf.hub import CheckpointError
from jax_rlhf.io.printable import printable_lines
from jax_rlhf.io.terminal import make_output_harmless
from jax_rlhf.parallel import (
    ProcessError,
    any_process,
    barrier,
    check_same_on_all_processes,
    exit_process,
    start_processes,
)
from jax_rlhf.rewards import RewardError
from jax_rlhf.runtime.checkpoint import RestoreError
from jax_rlhf.runtime.numerics import FaultError
from jax_rlhf.runtime.preemption import Stopped, StopSignals
from jax_rlhf.runtime.remote import open_workdir_at, refresh, upload
from jax_rlhf.runtime.workdir import check_shared, lock_workdir, status

_NOT_OF_FILES = (
    ConnectionError,
    TimeoutError,
    ChildProcessError,
    InterruptedError,
    BlockingIOError,
    ProcessLookupError,
)
_EXPECTED = (
    ValueError,
    FileNotFoundError,
    PermissionError,
    CheckpointError,
    DataError,
    FaultError,
    ProcessError,
    RewardError,
)

_CPU_INFO = Path("/proc/cpuinfo")
_CPU_KIND = ("vendor_id", "cpu family", "model", "flags", "CPU", "Features")  # not its clock, which varies
_CACHE_BYTES = 8 * 2**30  # past that JAX removes what was not used for longest

SAVED = 75
"""Exit code after SIGTERM, a maintenance notice or Ctrl-C: all is saved, the same command goes on. EX_TEMPFAIL."""
FAILED = 70
"""Exit code after an error that is not the user's: EX_SOFTWARE; launch scripts start again after it."""


def main(arguments: Sequence[str]) -> int:
    """Runs the phases.

    Args:
      arguments: what is left of the command line.

    Returns:
      The exit code: 0, 1 after an error in what the user gave, 70 after another one, 75 where it was asked to stop.
    """
    make_output_harmless()
    _quieten_writers()
    try:
        if len(arguments) > 1:
            raise ValueError(f"{arguments[1]!r} is no flag; fields are given as --config.name=value.")
        if WORKDIR.value is None:
            raise ValueError("--workdir=DIR is missing: the folder for models, metrics and samples.")
        process = COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value
        start_processes(*process, timeout=PROCESS_TIMEOUT.value)
        _keep_compiled(COMPILE_CACHE.value)
        stop = StopSignals().listen()  # to the very end
        workdir, _lock = open_workdir_at(WORKDIR.value)
        return _run(CONFIG.value, workdir, stop)
    except _EXPECTED as error:
        logging.debug("where it came from", exc_info=True)
        print(f"error: {printable_lines(str(error))}", file=sys.stderr)
        return exit_process(FAILED if getattr(error, "internal", False) else 1, error)
    except Stopped as error:
        print(f"stopped ({printable_lines(str(error))}); the same command goes on.", file=sys.stderr)
        return exit_process(SAVED, error)
    except SystemExit as error:  # of a reader, or of a package: who asks for 0 must not get it
        print(f"error: something that the run called has ended it: sys.exit({error.code!r})", file=sys.stderr)
        return exit_process(1, error)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the tokenizers library's panics are none of Exception
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, _NOT_OF_FILES):
            logging.debug("where it came from", exc_info=True)
            print(
                f"error: {printable_lines(str(error))}. What was saved before stays; mended, the same command goes on.",
                file=sys.stderr,
            )
            return exit_process(1, error)
        # Ours; where there are other processes, they must not wait for this one.
        print(printable_lines(traceback.format_exc()), file=sys.stderr)
        return exit_process(FAILED, error)


def _keep_compiled(folder: str) -> None:
    """Compiled programs are kept on the disk, so that the same run compiles nothing when it starts again.

    Not with several processes, which would have to agree on what is there, and not where JAX is told another folder.
    """
    given = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if not folder or jax.process_count() > 1 or given is not None:
        return
    # On the CPU a program uses what its machine has: one that shares the folder, and has less, must not run it.
    first = _CPU_INFO.read_text().partition("\n\n")[0].splitlines() if _CPU_INFO.exists() else []
    kind = sorted(line for line in first if line.startswith(_CPU_KIND))
    try:
        place = Path(folder).expanduser() / hashlib.blake2b("\n".join(kind).encode()).hexdigest()[:12]
        place.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # a container whose user has no home
        logging.warning("compiled programs are not kept: %s; --compile_cache=DIR names a folder.", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(place))
    jax.config.update("jax_compilation_cache_max_size", _CACHE_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _quieten_writers() -> None:
    """Of a write that fails orbax's and tensorstore's threads print hundreds of lines, some after ours.

    What went wrong in them is raised in this thread too. --verbosity=1 shows all.
    """
    if logging.get_verbosity() >= logging.DEBUG:
        return
    logging.get_absl_logger().addFilter(lambda record: not (record.exc_info and "/orbax/" in record.pathname))
    # What asyncio and Python's threads say of tasks and threads that end with an exception which nobody asks for.
    getLogger("asyncio").addFilter(lambda record: not (record.exc_info and _of_writers(record.exc_info[2])))
    former, of_threads = sys.unraisablehook, threading.excepthook
    sys.unraisablehook = lambda args: None if str(args.exc_value) == "Event loop is closed" else former(args)
    threading.excepthook = lambda args: None if _of_writers(args.exc_traceback) else of_threads(args)


def _of_writers(trace: TracebackType | None) -> bool:
    """Whether an exception comes from orbax or tensorstore, whose C++ leaves no frames."""
    files = [frame.filename for frame in traceback.extract_tb(trace)]
    return not files or any("/orbax/" in file or "/tensorstore/" in file for file in files)


def _run(config: ConfigDict, workdir: Path, stop: StopSignals) -> int:
    locks: list[BaseFileLock] = []  # process 0's, once it has it: held until the end
    try:
        code = _run_phases(config, workdir, stop, locks)
    except BaseException as error:
        if locks and isinstance(error, RestoreError):  # who is told to give --overwrite must be believed
            forget_overwritten(workdir)
        if locks and not isinstance(error, Stopped):
            forget_failed_start(workdir)
        raise
    else:
        if locks:
            forget_overwritten(workdir)
        return code
    finally:
        for lock in locks:
            lock.release()


def _run_phases(config: ConfigDict, workdir: Path, stop: StopSignals, locks: list[BaseFileLock]) -> int:
    first, overwrite, accept_changes = jax.process_index() == 0, OVERWRITE.value, ACCEPT_CHANGES.value
    if overwrite and any_process(first and overwritten(workdir, config)):
        overwrite = False
        if first:
            print(f"--overwrite was done when this run began in {workdir}; it goes on.", flush=True)
    with barrier("checking settings, data and checkpoints"):
        settings = run_config(config)
        if first:
            print("checking settings, data and checkpoints", flush=True)
        seen = check_run(settings, workdir, overwrite=overwrite, accept_changes=accept_changes)
    if CHECK.value:
        seen.append(f"checked: settings, data and checkpoints of {', '.join(settings.phases)}; nothing was trained")
        for line in seen if first else ():
            print(printable_lines(line))
        return 0
    check_same_on_all_processes(config.to_json_best_effort(sort_keys=True, indent=1), "the settings")
    changed = []
    with barrier(f"writing to {workdir}"):
        if first:
            locks.append(lock_workdir(workdir))
            how = {"overwrite": overwrite, "accept_changes": accept_changes}
            changed = open_workdir(workdir, config, settings.phases, **how)
    for line in changed:
        print(f"changed: {printable_lines(line)}")
    with barrier(f"looking at {workdir}"):
        refresh(workdir)
        check_shared(workdir)
    results = {}
    for phase in settings.phases:
        stop.check()
        if any_process(first and status(workdir, phase) == "finished"):
            if first:
                print(f"{phase}: finished before, in {workdir / phase}; --overwrite repeats it.")
            continue
        with barrier(f"looking at what {phase} begins with"):
            for line in check_inputs(settings, workdir, phase, accept_changes=accept_changes) if first else ():
                print(f"changed: {printable_lines(line)}")
        results[phase] = run_phase(phase, settings, workdir, stop=stop, accept_changes=accept_changes)
        with barrier(f"putting {phase} up"):
            upload(workdir, phase, models=True)
        with barrier(f"fetching what {phase} made"):
            refresh(workdir)
    if first:
        print(closing(results, workdir, tensorboard=settings.log.tensorboard))
    return 0


def run() -> None:
    """The command `jax-rlhf run`."""
    app.run(main, flags_parser=parse_flags)
