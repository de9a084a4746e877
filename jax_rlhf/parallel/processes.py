"""Several processes: how they find each other, agree on what to do, and end when one of them fails.

They communicate through `jax.distributed` and collectives over their devices only. Before all stop, continue or give
up, they exchange that decision. If a process dies, the others miss its heartbeats, and end too.
"""

import contextlib
import glob
import hashlib
import importlib.util
import math
import os
import re
import socket
import sys
import time
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

_TEXT_BYTES = 4096
"""Size of the buffer in which `gather_texts` exchanges a text."""


class ProcessError(RuntimeError):
    """Another process failed; the message has its index and its error.

    Attributes:
      internal: whether the cause is a bug or a lost machine, rather than the user's input.
    """

    def __init__(self, message: str, *, internal: bool = False) -> None:
        super().__init__(message)
        self.internal = internal


def start_processes(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = 100,
) -> None:
    """Joins the other processes, if there are any. It must be called before JAX initializes its devices.

    TPU VMs, Slurm, Open MPI and Kubernetes (an indexed Job) are detected from the environment. A process runs alone if
    none of these is detected and no argument is set, if `num_processes` is 1, or if it is the Pod of index 0 and
    nothing names other processes.

    Args:
      coordinator: "host:port" of process 0; None = JAX_COORDINATOR_ADDRESS, or detected.
      num_processes: the number of processes; None = JAX_NUM_PROCESSES, or detected.
      process_id: the index of this process; None = JAX_PROCESS_ID, or detected.
      timeout: seconds without a heartbeat after which a process counts as dead, and the others end.

    Raises:
      ProcessError: the coordinator's name cannot be resolved for five minutes.
      ValueError: one of the three has an invalid value, or some are set and the rest cannot be detected; the message
        says what to set.
    """
    _leave_threads_for_collectives()
    explicit = _explicit(os.environ, coordinator, num_processes, process_id)
    cluster = cluster_name(os.environ)
    if explicit[1] == 1 or (explicit == (None, None, None) and cluster is None):
        return
    if explicit[0] is not None and None not in explicit:
        _wait_for_name(explicit[0].rpartition(":")[0].strip("[]"))
        # Without detection a process takes all devices of its machine; detection of Slurm would assign it one.
        jax.distributed.initialize(*explicit, cluster_detection_method="deactivate", heartbeat_timeout_seconds=timeout)
    elif cluster is None:
        raise ValueError(
            f"--coordinator={explicit[0]} --num_processes={explicit[1]} --process_id={explicit[2]}: without a cluster "
            "that JAX detects, set all three, the first two to the same value in every process."
        )
    elif cluster == "k8s":
        if not _join_in_kubernetes(explicit, timeout):
            return
    else:
        method = None if cluster == "tpu" else cluster  # JAX has two methods for TPUs, and picks the right one itself
        jax.distributed.initialize(*explicit, cluster_detection_method=method, heartbeat_timeout_seconds=timeout)
    _disable_compilation_cache_on_cpus()


def _explicit(
    environment: Mapping[str, str], coordinator: str | None, num_processes: int | None, process_id: int | None
) -> tuple[str | None, int | None, int | None]:
    """Coordinator, number of processes and index from the arguments or the environment, checked; None = not set."""
    coordinator = coordinator or environment.get("JAX_COORDINATOR_ADDRESS") or None
    if num_processes is None:
        num_processes = _whole_number(environment, "JAX_NUM_PROCESSES")
    if process_id is None:
        process_id = _whole_number(environment, "JAX_PROCESS_ID")
    if coordinator is not None:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise ValueError(
                f"--coordinator, or JAX_COORDINATOR_ADDRESS, is {coordinator!r}; it must be HOST:PORT of process 0, "
                "such as 10.0.0.1:8476."
            )
    if num_processes is not None and num_processes < 1:
        raise ValueError(f"--num_processes, or JAX_NUM_PROCESSES, is {num_processes}; it must be 1 or more.")
    if process_id is not None and not 0 <= process_id < (num_processes or math.inf):
        last = "" if num_processes is None else f" to {num_processes - 1}, since there are {num_processes}"
        raise ValueError(f"--process_id, or JAX_PROCESS_ID, is {process_id}; processes are counted from 0{last}.")
    return coordinator, num_processes, process_id


def _whole_number(environment: Mapping[str, str], name: str) -> int | None:
    """The number in an environment variable; None if it is not set, or empty."""
    text = environment.get(name, "").strip()
    if not text:
        return None
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"the environment variable {name} is {text!r}, which is not a whole number.") from error


def _wait_for_name(host: str, seconds: float = 300.0) -> None:
    """Waits until the coordinator's name can be resolved: the name of a Pod cannot before the Pod runs.

    JAX does the same for an address that it detects itself, and waits as long for the connection.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            socket.getaddrinfo(host, None)
        except OSError as error:
            if time.monotonic() > end:
                message = f"the name of the coordinator, {host}, cannot be resolved: {error}."
                raise ProcessError(message, internal=True) from error
            time.sleep(1.0)
        else:
            return


_IN_KUBERNETES = (
    "In an indexed Job of several Pods, set in each Pod JAX_COORDINATOR_ADDRESS=HOST:8476, where HOST is the name of "
    "the Pod of index 0 (<Job>-0.<subdomain>; in a JobSet <JobSet>-<replicated job>-0-0.<JobSet>), "
    "JAX_NUM_PROCESSES=<the Job's completions>, and JAX_PROCESS_ID from the annotation "
    "batch.kubernetes.io/job-completion-index: launch/gpu_jobset.yaml does so. For a Job of one Pod, "
    "JAX_NUM_PROCESSES=1 is enough."
)


def _join_in_kubernetes(explicit: tuple[str | None, int | None, int | None], timeout: int) -> bool:
    """Joins the other Pods of an indexed Job; JAX finds them through the API server, with the package `kubernetes`.

    Without that package, and if nothing names other processes, the Pod of index 0 runs alone. If there are other Pods
    nevertheless, they raise ValueError, and the Job fails. Returns whether other Pods were joined.
    """
    if not importlib.util.find_spec("kubernetes"):
        index = _whole_number(os.environ, "JOB_COMPLETION_INDEX")
        if explicit == (None, None, None) and index == 0:
            logging.warning("this Pod has index 0 and nothing names other processes: it runs alone.")
            return False
        raise ValueError(
            f"this Pod has index {index} of an indexed Job, and it cannot find the others from "
            f"--coordinator={explicit[0]} --num_processes={explicit[1]} --process_id={explicit[2]}. {_IN_KUBERNETES}"
        )
    try:
        # No cluster_detection_method: JAX's class for Kubernetes has no name by which it could be selected.
        jax.distributed.initialize(*explicit, heartbeat_timeout_seconds=timeout)
    except jax.errors.JaxRuntimeError:  # the others were found, but did not join in time: a retry may succeed
        raise
    except Exception as error:  # from the package `kubernetes`: no rights, no token, no headless service
        raise ValueError(f"JAX cannot find the other Pods: {error}. {_IN_KUBERNETES}") from error
    return True


def _disable_compilation_cache_on_cpus() -> None:
    """Disables the compilation cache for several processes on CPUs, where a program from the cache can hang.

    Seen with jax 0.10.2: PPO's update of two processes ran when it had just been compiled, and hung when both processes
    had read it from JAX_COMPILATION_CACHE_DIR. A single process of eight devices is not affected.
    """
    cache = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue] -- added at run time
    if jax.process_count() > 1 and jax.default_backend() == "cpu" and cache:
        jax.config.update("jax_enable_compilation_cache", False)
        logging.warning("several processes on CPUs: the compilation cache is not used, since its programs can hang.")


def _leave_threads_for_collectives() -> None:
    """Gives simulated CPU devices (XLA_FLAGS) enough threads for their collectives.

    XLA's collectives wait in a thread pool of one thread per device. If a device runs two collectives at once, all
    threads can be waiting, each for a collective that has no thread, until XLA gives up after 40 seconds. That happened
    in two of four runs of eight devices on two busy cores, and in none of six runs with four threads per device.
    """
    simulated = re.search(r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    if simulated and int(simulated[1]) > 1:
        os.environ.setdefault("PJRT_NPROC", str(4 * int(simulated[1])))


def cluster_name(environment: Mapping[str, str]) -> str | None:
    """The kind of cluster in which this process was started.

    Args:
      environment: the environment variables.

    Returns:
      "slurm", "ompi" or "tpu", the names that `jax.distributed.initialize` uses, or "k8s"; None if none is detected.

    Raises:
      ValueError: a variable that counts processes is not a whole number.
    """
    if (_whole_number(environment, "SLURM_NTASKS") or 1) > 1 and {
        "SLURM_PROCID",
        "SLURM_STEP_NODELIST",
    } <= environment.keys():
        return "slurm"
    if (_whole_number(environment, "OMPI_COMM_WORLD_SIZE") or 1) > 1:
        return "ompi"
    if _has_tpu(environment):
        return "tpu"
    if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys():
        return "k8s"
    return None


def _has_tpu(environment: Mapping[str, str]) -> bool:
    if environment.get("JAX_PLATFORMS", "tpu").partition(",")[0] != "tpu" or not importlib.util.find_spec("libtpu"):
        return False
    return bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))


@contextlib.contextmanager
def barrier(what: str) -> Iterator[None]:
    """Wraps work that each process does by itself: at the end all wait, and all fail if one failed.

    An error of this process itself is raised again, with the attribute `on_all_processes` set.

    Args:
      what: a name of the work, for the message.

    Raises:
      ProcessError: another process failed in this work.
    """
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    if jax.process_count() > 1:
        of_user = isinstance(failure, ValueError | OSError) or type(failure).__module__.startswith("jax_rlhf.")
        kind = "user" if of_user else "internal"
        texts = gather_texts("" if failure is None else f"{kind} {type(failure).__name__}: {failure}")
        failed = [index for index, text in enumerate(texts) if text]
        if failure is None and failed:
            kind, _, text = texts[failed[0]].partition(" ")
            failure = ProcessError(f"process {failed[0]}, {what}: {text}", internal=kind == "internal")
        if failure is not None:
            failure.on_all_processes = True  # pyright: ignore[reportAttributeAccessIssue] -- of any exception
    if failure is not None:
        raise failure


def gather_texts(text: str) -> list[str]:
    """Gathers a text from every process; all must call it.

    Args:
      text: of this process; only the first 4,096 bytes are sent.

    Returns:
      The texts in the order of the processes.
    """
    content = text.encode()[:_TEXT_BYTES]
    padded = np.zeros(_TEXT_BYTES, np.uint8)
    padded[: len(content)] = np.frombuffer(content, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(-1, _TEXT_BYTES)  # [processes, bytes]
    return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in rows]


def check_same_on_all_processes(text: str, what: str) -> None:
    """Raises on all processes if a text is not the same on all of them.

    Args:
      text: of any length; it is compared by its digest.
      what: a name of the text, for the message.

    Raises:
      ProcessError: a process has another text; the message has its index and the first line that differs.
    """
    if jax.process_count() == 1:
        return
    texts = gather_texts(f"{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}\n{text}")
    other = next((index for index, one in enumerate(texts) if one != texts[0]), None)
    if other is not None:
        lines = [one.splitlines()[1:] for one in (texts[other], texts[0])]
        shown = next(
            (pair for pair in zip(*lines, strict=False) if pair[0] != pair[1]), ("something", "something else")
        )
        error = ProcessError(
            f"{what}: process {other} has {shown[0].strip()!r}, process 0 has {shown[1].strip()!r}. All processes need "
            "the same files and the same command line."
        )
        error.on_all_processes = True  # pyright: ignore[reportAttributeAccessIssue]
        raise error


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process; all must call it."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def sum_over_processes(counts: np.ndarray) -> np.ndarray:
    """Sums counts over all processes; all must call it.

    Args:
      counts: int[n], of this process.

    Returns:
      int[n], of the same dtype.
    """
    if jax.process_count() == 1:
        return counts
    by_process = multihost_utils.process_allgather(counts).reshape(-1, len(counts))  # [processes, n]
    return np.sum(by_process, axis=0, dtype=counts.dtype)


def exit_process(code: int, error: BaseException | None = None) -> int:
    """Ends a process that fails alone at once; otherwise returns the exit code.

    If one of several processes fails alone, it must not wait for the others at exit, as JAX would: they may wait for it
    in a collective, and only the missing heartbeats tell them that it is gone.

    Args:
      code: the exit code.
      error: the error that ends the process, or None.

    Returns:
      The exit code, with which the caller should end the process normally.
    """
    # Until this process has joined the others it runs alone. `process_count` would initialize the devices then.
    alone = not jax.distributed.is_initialized() or jax.process_count() == 1
    if error is None or alone or getattr(error, "on_all_processes", False):
        return code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
