"""The command `python -m jax_rlhf --config=FILE [--config.a.b=value …] --workdir=DIR`: runs the phases of the
config."""

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
from jax_rlhf.cli.summary import summary_text
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

# OSErrors that do not concern files. Their cause is not in what the user gave.
_NOT_FILE_ERRORS = (
    ConnectionError,
    TimeoutError,
    ChildProcessError,
    InterruptedError,
    BlockingIOError,
    ProcessLookupError,
)
# Errors in what the user gave: printed without a traceback.
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
_CPU_MODEL = ("vendor_id", "cpu family", "model", "flags", "CPU", "Features")  # without the clock rate, which varies
_CACHE_BYTES = 8 * 2**30  # above this JAX removes the least recently used programs

SAVED = 75
"""Exit code (EX_TEMPFAIL) after SIGTERM, a maintenance notice or Ctrl-C: the state is saved, and the same command
    continues the run."""
FAILED = 70
"""Exit code (EX_SOFTWARE) after an error whose cause is not in what the user gave; launch scripts restart the run."""


def main(arguments: Sequence[str]) -> int:
    """Runs the phases.

    Args:
      arguments: the command line without its flags.

    Returns:
      The exit code: 0 = finished, 1 = an error in what the user gave, 70 = any other error, 75 = asked to stop.
    """
    make_output_harmless()
    _silence_writer_threads()
    try:
        if len(arguments) > 1:
            raise ValueError(f"{arguments[1]!r} is not a flag; set fields with --config.name=value.")
        if WORKDIR.value is None:
            raise ValueError("--workdir=DIR is missing: the folder for models, metrics and samples.")
        process = COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value
        start_processes(*process, timeout=PROCESS_TIMEOUT.value)
        _keep_compiled(COMPILE_CACHE.value)
        stop = StopSignals().install()  # until the process ends
        workdir, _lock = open_workdir_at(WORKDIR.value)
        return _run(CONFIG.value, workdir, stop)
    except _EXPECTED as error:
        logging.debug("traceback", exc_info=True)
        print(f"error: {printable_lines(str(error))}", file=sys.stderr)
        return exit_process(FAILED if getattr(error, "internal", False) else 1, error)
    except Stopped as error:
        print(f"stopped ({printable_lines(str(error))}); run the same command again to continue.", file=sys.stderr)
        return exit_process(SAVED, error)
    except SystemExit as error:  # from a reader or a package; exit code 0 would claim success
        print(f"error: code that the run called has ended it with sys.exit({error.code!r})", file=sys.stderr)
        return exit_process(1, error)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # panics of the tokenizers library are no subclass of Exception
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, _NOT_FILE_ERRORS):
            logging.debug("traceback", exc_info=True)
            print(
                f"error: {printable_lines(str(error))}. Checkpoints are kept; fix the cause, and run the same command "
                "again to continue.",
                file=sys.stderr,
            )
            return exit_process(1, error)
        # A bug of this program. `exit_process` tells other processes, so that they do not wait for this one.
        print(printable_lines(traceback.format_exc()), file=sys.stderr)
        return exit_process(FAILED, error)


def _keep_compiled(folder: str) -> None:
    """Keeps compiled programs on the disk, so that a restarted run compiles nothing.

    It does nothing with several processes, which would have to agree on the content of the folder, or if JAX's own
    cache folder is set.
    """
    given = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if not folder or jax.process_count() > 1 or given is not None:
        return
    # A program for CPU uses all instructions of its machine. So machines with other CPUs, which may share the folder,
    # need another subfolder.
    first = _CPU_INFO.read_text().partition("\n\n")[0].splitlines() if _CPU_INFO.exists() else []
    cpu = sorted(line for line in first if line.startswith(_CPU_MODEL))
    try:
        cache = Path(folder).expanduser() / hashlib.blake2b("\n".join(cpu).encode()).hexdigest()[:12]
        cache.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # e.g. a container whose user has no home
        logging.warning("compiled programs are not kept: %s; choose a folder with --compile_cache=DIR.", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_compilation_cache_max_size", _CACHE_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _silence_writer_threads() -> None:
    """Suppresses the output of the threads of orbax and tensorstore after a failed write.

    They print hundreds of lines, some of them after the error message. Their error is raised in the main thread too.
    --verbosity=1 shows all.
    """
    if logging.get_verbosity() >= logging.DEBUG:
        return
    logging.get_absl_logger().addFilter(lambda record: not (record.exc_info and "/orbax/" in record.pathname))
    # asyncio and threading report exceptions of tasks and threads that nothing waits for.
    getLogger("asyncio").addFilter(lambda record: not (record.exc_info and _from_writer(record.exc_info[2])))
    unraisable_hook, thread_hook = sys.unraisablehook, threading.excepthook
    sys.unraisablehook = lambda args: None if str(args.exc_value) == "Event loop is closed" else unraisable_hook(args)
    threading.excepthook = lambda args: None if _from_writer(args.exc_traceback) else thread_hook(args)


def _from_writer(trace: TracebackType | None) -> bool:
    """Whether an exception comes from orbax or tensorstore. The C++ code of the latter leaves no frames."""
    files = [frame.filename for frame in traceback.extract_tb(trace)]
    return not files or any("/orbax/" in file or "/tensorstore/" in file for file in files)


def _run(config: ConfigDict, workdir: Path, stop: StopSignals) -> int:
    locks: list[BaseFileLock] = []  # the lock of the workdir, in process 0, which it keeps until the end
    try:
        code = _run_phases(config, workdir, stop, locks)
    except BaseException as error:
        if locks and isinstance(error, RestoreError):  # its message may advise --overwrite, which must then delete
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
            print(f"--overwrite was already applied when this run started in {workdir}; continuing.", flush=True)
    with barrier("checking settings, data and checkpoints"):
        settings = run_config(config)
        if first:
            print("checking settings, data and checkpoints", flush=True)
        lines = check_run(settings, workdir, overwrite=overwrite, accept_changes=accept_changes)
    if CHECK.value:
        lines.append(f"checked: settings, data and checkpoints of {', '.join(settings.phases)}; nothing was trained")
        for line in lines if first else ():
            print(printable_lines(line))
        return 0
    check_same_on_all_processes(config.to_json_best_effort(sort_keys=True, indent=1), "the settings")
    changed = []
    with barrier(f"writing to {workdir}"):
        if first:
            locks.append(lock_workdir(workdir))
            changed = open_workdir(workdir, config, settings.phases, overwrite=overwrite, accept_changes=accept_changes)
    for line in changed:
        print(f"changed: {printable_lines(line)}")
    with barrier(f"reading {workdir}"):
        refresh(workdir)
        check_shared(workdir)
    results = {}
    for phase in settings.phases:
        stop.check()
        if any_process(first and status(workdir, phase) == "finished"):
            if first:
                print(f"{phase}: already finished, in {workdir / phase}; --overwrite repeats it.")
            continue
        with barrier(f"checking the models that {phase} starts from"):
            for line in check_inputs(settings, workdir, phase, accept_changes=accept_changes) if first else ():
                print(f"changed: {printable_lines(line)}")
        results[phase] = run_phase(phase, settings, workdir, stop=stop, accept_changes=accept_changes)
        with barrier(f"uploading {phase}"):
            upload(workdir, phase, models=True)
        with barrier(f"downloading {phase}"):
            refresh(workdir)
    if first:
        print(summary_text(results, workdir, tensorboard=settings.log.tensorboard))
    return 0


def run() -> None:
    """The entry point of `jax-rlhf run`."""
    app.run(main, flags_parser=parse_flags)
