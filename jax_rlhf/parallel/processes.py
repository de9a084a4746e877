"""Several processes: how they find each other, agree, and fail together.

Between them there is only `jax.distributed` and collectives over their devices. What all must do alike (stop, go on,
give up) they say to each other first; one that dies without a word is missed by the others' heartbeats, and they end.
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


class ProcessError(RuntimeError):
    """Another process failed; the message says which, and what it said.

    Attributes:
      internal: whether the cause is a bug or a lost machine, rather than what the user gave.
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
    """Joins the other processes, where there are any; to be called before JAX looks for devices.

    A TPU VM, Slurm, Open MPI, and Kubernetes (an indexed Job) are known by what they put into the environment. Without
    any of these, and without arguments, the process is alone; so is the Pod of index 0 where nothing names others, and
    any process that is told that there is one.

    Args:
      coordinator: "host:port" of process 0; None = found out, or JAX_COORDINATOR_ADDRESS.
      num_processes, process_id: how many, and which this is; None = found out, or JAX_NUM_PROCESSES, JAX_PROCESS_ID.
      timeout: seconds of silence after which a process counts as dead, and the others end.

    Raises:
      ProcessError: the coordinator's name is not known after five minutes.
      ValueError: one of the three has a value that cannot be, or some are given and the rest cannot be found out; says
        what to set.
    """
    _leave_threads_for_collectives()
    explicit = _told(os.environ, coordinator, num_processes, process_id)
    cluster = cluster_name(os.environ)
    if explicit[1] == 1 or (explicit == (None, None, None) and cluster is None):
        return
    if explicit[0] is not None and None not in explicit:
        _wait_for_name(explicit[0].rpartition(":")[0].strip("[]"))
        # Without detection a process takes all devices of its machine, also where Slurm's would take one.
        jax.distributed.initialize(*explicit, cluster_detection_method="deactivate", heartbeat_timeout_seconds=timeout)
    elif cluster is None:
        raise ValueError(
            f"--coordinator={explicit[0]} --num_processes={explicit[1]} --process_id={explicit[2]}: without a cluster "
            "that JAX knows all three are needed, the first two the same in every process."
        )
    elif cluster == "k8s":
        if not _join_in_kubernetes(explicit, timeout):
            return
    else:
        method = None if cluster == "tpu" else cluster  # on TPUs JAX has two, and picks the right one
        jax.distributed.initialize(*explicit, cluster_detection_method=method, heartbeat_timeout_seconds=timeout)
    _compile_collectives_anew()


def _told(
    environment: Mapping[str, str], coordinator: str | None, num_processes: int | None, process_id: int | None
) -> tuple[str | None, int | None, int | None]:
    """The three as given, or as the environment has them, each checked; None = not given."""
    coordinator = coordinator or environment.get("JAX_COORDINATOR_ADDRESS") or None
    if num_processes is None:
        num_processes = _whole_number(environment, "JAX_NUM_PROCESSES")
    if process_id is None:
        process_id = _whole_number(environment, "JAX_PROCESS_ID")
    if coordinator is not None:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise ValueError(
                f"--coordinator, or JAX_COORDINATOR_ADDRESS, is {coordinator!r}; it is HOST:PORT of process 0, such as "
                "10.0.0.1:8476."
            )
    if num_processes is not None and num_processes < 1:
        raise ValueError(f"--num_processes, or JAX_NUM_PROCESSES, is {num_processes}; it is 1 or more.")
    if process_id is not None and not 0 <= process_id < (num_processes or math.inf):
        of_all = "" if num_processes is None else f" to {num_processes - 1}, since there are {num_processes}"
        raise ValueError(f"--process_id, or JAX_PROCESS_ID, is {process_id}; processes are counted from 0{of_all}.")
    return coordinator, num_processes, process_id


def _whole_number(environment: Mapping[str, str], name: str) -> int | None:
    """A variable's number; None where it is not set, or empty."""
    text = environment.get(name, "").strip()
    if not text:
        return None
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"the environment variable {name} is {text!r}, which is no whole number.") from error


def _wait_for_name(host: str, seconds: float = 300.0) -> None:
    """Waits until the coordinator's name can be looked up: a Pod's is known only once it runs.

    JAX does the same where it finds the address by itself, and waits as long for the connection.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            socket.getaddrinfo(host, None)
        except OSError as error:
            if time.monotonic() > end:
                raise ProcessError(f"the coordinator {host} is not known here: {error}.", internal=True) from error
            time.sleep(1.0)
        else:
            return


_IN_KUBERNETES = (
    "In an indexed Job of several Pods, set in each Pod JAX_COORDINATOR_ADDRESS=HOST:8476, where HOST is the name of "
    "the Pod of index 0 (<Job>-0.<subdomain>; in a JobSet <JobSet>-<replicated job>-0-0.<JobSet>), "
    "JAX_NUM_PROCESSES=<the Job's completions>, and JAX_PROCESS_ID from the annotation "
    "batch.kubernetes.io/job-completion-index: launch/gpu_jobset.yaml does so. Where there is one Pod, "
    "JAX_NUM_PROCESSES=1 is enough."
)


def _join_in_kubernetes(explicit: tuple[str | None, int | None, int | None], timeout: int) -> bool:
    """Joins the other Pods of an indexed Job as JAX finds them: it asks the API server, with the package `kubernetes`.

    Without that package, and without anything that names others, the Pod of index 0 is alone. Should there be others,
    they end with this error, and so does the Job. Returns whether there are others.
    """
    if not importlib.util.find_spec("kubernetes"):
        index = _whole_number(os.environ, "JOB_COMPLETION_INDEX")
        if explicit == (None, None, None) and index == 0:
            logging.warning("this Pod has index 0 and nothing names other processes: it runs alone.")
            return False
        raise ValueError(
            f"this Pod has index {index} of an indexed Job, and what it is told does not say how to find the others: "
            f"--coordinator={explicit[0]} --num_processes={explicit[1]} --process_id={explicit[2]}. {_IN_KUBERNETES}"
        )
    try:
        # No cluster_detection_method: JAX's class for Kubernetes has no name to choose it by.
        jax.distributed.initialize(*explicit, heartbeat_timeout_seconds=timeout)
    except jax.errors.JaxRuntimeError:  # the others were found, and did not come: the same command may work later
        raise
    except Exception as error:  # of the package `kubernetes`: no rights, no token, no headless service
        raise ValueError(f"JAX cannot find the other Pods: {error}. {_IN_KUBERNETES}") from error
    return True


def _compile_collectives_anew() -> None:
    """On CPUs of several processes, where a program from the compilation cache can wait for ever.

    Seen with jax 0.10.2: PPO's update of two processes ran where it was compiled, and never ended where both had read
    it from JAX_COMPILATION_CACHE_DIR; one process of eight devices is not concerned.
    """
    cache = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue] -- added at run time
    if jax.process_count() > 1 and jax.default_backend() == "cpu" and cache:
        jax.config.update("jax_enable_compilation_cache", False)
        logging.warning("several processes on CPUs: the compilation cache is not used, since its programs can hang.")


def _leave_threads_for_collectives() -> None:
    """For CPU devices that XLA_FLAGS makes up.

    XLA's collectives wait in the threads of one pool, which has as many as there are devices. Where a device runs two
    collectives at once they can all wait, each for one that has no thread, until XLA gives up after 40 seconds: seen in
    two of four runs of eight devices on two busy cores, and in none of six with four threads per device.
    """
    made_up = re.search(r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    if made_up and int(made_up[1]) > 1:
        os.environ.setdefault("PJRT_NPROC", str(4 * int(made_up[1])))


def cluster_name(environment: Mapping[str, str]) -> str | None:
    """What started this process, if it started several.

    Args:
      environment: variables.

    Returns:
      "slurm", "ompi", "tpu", as `jax.distributed.initialize` calls them, or "k8s"; None = nothing of the kind.

    Raises:
      ValueError: a variable that counts processes is no whole number.
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
    """A part that each process does by itself, at whose end all know whether all did.

    Args:
      what: it is, for the message.

    Yields:
      Nothing.

    Raises:
      ProcessError: another process failed in it. Where this one fails, its own error goes on, marked `on_any_process`.
    """
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    if jax.process_count() > 1:
        given = isinstance(failure, ValueError | OSError) or type(failure).__module__.startswith("jax_rlhf.")
        kind = "given" if given else "internal"
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
    """A text of every process; all must call it.

    Args:
      text: this process's; what is past 4,096 bytes is cut off.

    Returns:
      By process.
    """
    content = text.encode()[:_TEXT_BYTES]
    padded = np.zeros(_TEXT_BYTES, np.uint8)
    padded[: len(content)] = np.frombuffer(content, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(-1, _TEXT_BYTES)
    return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in rows]


def check_same_on_all_processes(text: str, what: str) -> None:
    """Raises on all processes where they do not agree.

    Args:
      text: what should be the same, however long.
      what: it is, for the message.

    Raises:
      ProcessError: which process has something else; the first line that differs.
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
            "the same files and the same command."
        )
        error.on_all_processes = True  # pyright: ignore[reportAttributeAccessIssue]
        raise error


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process; all must call it.

    Args:
      flag: this process's.

    Returns:
      Whether.
    """
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def sum_over_processes(counts: np.ndarray) -> np.ndarray:
    """Counts of all processes together; all must call it.

    Args:
      counts: int[n], this process's.

    Returns:
      int[n], of the same type.
    """
    if jax.process_count() == 1:
        return counts
    every = multihost_utils.process_allgather(counts).reshape(-1, len(counts))
    return np.sum(every, axis=0, dtype=counts.dtype)


def leave(code: int, error: BaseException | None = None) -> int:
    """How a process ends.

    One of several that fails by itself does not wait for the others, as JAX would at exit: they may be in a computation
    that this one has left, and learn from its silence that it is gone.

    Args:
      code: the exit code.
      error: what went wrong, if it did.

    Returns:
      The code, where the process may end as Python does.
    """
    # Before the others are joined there are none; to count them would start the devices, which may wait for them.
    alone = not jax.distributed.is_initialized() or jax.process_count() == 1
    if error is None or alone or getattr(error, "on_all_processes", False):
        return code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
