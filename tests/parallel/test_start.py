"""How a process learns its index and the number of processes.

Most tests replace `jax.distributed.initialize` and check its arguments. A few start real processes.
"""

import importlib.machinery
import json
import os
import subprocess
import sys
import types

import jax
import pytest

from jax_rlhf.parallel import ProcessError, exit_process, processes as module, start_processes
from tests.processes import finish, free_port, start

POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
TOLD = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:8476", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}


@pytest.fixture
def asked(monkeypatch):
    """Removes all cluster variables. Returns jax.distributed.initialize's calls: (positional, keyword arguments)."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *three, **other: calls.append((three, other)))
    for name in tuple(os.environ):
        if name.startswith(("JAX_COORD", "JAX_NUM", "JAX_PROC", "SLURM", "OMPI", "KUBE", "JOB_")):
            monkeypatch.delenv(name)
    return calls


def set_all(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def test_a_process_without_settings_is_alone(asked):
    start_processes()
    assert not asked


def test_incomplete_flags_are_an_error(asked):
    with pytest.raises(ValueError, match=r"--num_processes=2 --process_id=None: without a cluster .* set all three"):
        start_processes("127.0.0.1:1", 2, None)
    assert not asked


@pytest.mark.parametrize("in_a_pod", [{}, POD | {"JOB_COMPLETION_INDEX": "3"}])
def test_the_three_variables_switch_off_cluster_detection(asked, monkeypatch, in_a_pod):
    set_all(monkeypatch, TOLD | in_a_pod)
    start_processes(timeout=7)
    ((three, other),) = asked
    assert three == ("127.0.0.1:8476", 4, 3)
    # Local devices are not chosen either, so that a Pod's process gets all of its GPUs.
    assert other == {"cluster_detection_method": "deactivate", "heartbeat_timeout_seconds": 7}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two', which is not a whole number"),
        ({"JAX_NUM_PROCESSES": "1e3"}, "JAX_NUM_PROCESSES is '1e3', which is not a whole number"),
        ({"JAX_NUM_PROCESSES": "0"}, "JAX_NUM_PROCESSES, is 0; it must be 1 or more"),
        ({"JAX_PROCESS_ID": "first"}, "JAX_PROCESS_ID is 'first', which is not a whole number"),
        ({"JAX_PROCESS_ID": "4"}, "is 4; processes are counted from 0 to 3, since there are 4"),
        ({"JAX_PROCESS_ID": "-1"}, "is -1; processes are counted from 0"),
        ({"JAX_NUM_PROCESSES": "1"}, "is 3; processes are counted from 0 to 0"),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1"}, "is '10.0.0.1'; it must be HOST:PORT"),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1:"}, "it must be HOST:PORT"),
        ({"JAX_COORDINATOR_ADDRESS": ":8476"}, "it must be HOST:PORT"),
        ({"JAX_COORDINATOR_ADDRESS": "host:99999"}, "it must be HOST:PORT"),
        ({"SLURM_NTASKS": "many"}, "SLURM_NTASKS is 'many', which is not a whole number"),
        ({"OMPI_COMM_WORLD_SIZE": "x"}, "OMPI_COMM_WORLD_SIZE is 'x', which is not a whole number"),
    ],
)
def test_an_invalid_value_is_an_error_that_names_the_variable(asked, monkeypatch, wrong, says):
    set_all(monkeypatch, TOLD | wrong)
    with pytest.raises(ValueError, match=says):
        start_processes()
    assert not asked


def test_empty_variables_count_as_not_set(asked, monkeypatch):
    set_all(monkeypatch, dict.fromkeys(TOLD, ""))
    start_processes()
    assert not asked


@pytest.mark.parametrize("environment", [{}, POD | {"JOB_COMPLETION_INDEX": "0"}])
def test_a_single_process_does_not_initialize_jax_distributed(asked, monkeypatch, environment):
    set_all(monkeypatch, environment | {"JAX_NUM_PROCESSES": "1"})
    start_processes()
    start_processes("127.0.0.1:1", 1, 0)
    assert not asked


def without_kubernetes(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "kubernetes" else found(name))


def test_an_indexed_job_of_one_pod_needs_no_settings(asked, monkeypatch):
    without_kubernetes(monkeypatch)
    set_all(monkeypatch, POD | {"JOB_COMPLETION_INDEX": "0"})
    start_processes()
    assert not asked


@pytest.mark.parametrize("told", [{}, {"JAX_NUM_PROCESSES": "4"}, {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1"}])
def test_a_pod_with_missing_settings_is_an_error_that_lists_them(asked, monkeypatch, told):
    without_kubernetes(monkeypatch)
    for index in "13" if not told else "01":
        set_all(monkeypatch, POD | told | {"JOB_COMPLETION_INDEX": index})
        with pytest.raises(ValueError, match=f"index {index} of an indexed Job") as error:
            start_processes()
        for wanted in (*TOLD, "completions", "batch.kubernetes.io/job-completion-index", "launch/gpu_jobset.yaml"):
            assert wanted in str(error.value)
    assert not asked


def kubernetes(folder, answer):
    """Writes a fake package `kubernetes`, whose API server executes `answer`, a line of Python, for each query."""
    (folder / "kubernetes").mkdir()
    (folder / "kubernetes" / "__init__.py").write_text(f"""
from types import SimpleNamespace as S
class ApiException(Exception):
    status, reason = 403, "Forbidden"
def ask(**_):
    {answer}
config = S(load_incluster_config=lambda: None)
api = S(list_namespaced_pod=ask, read_namespaced_job=ask)
client = S(CoreV1Api=lambda: api, BatchV1Api=lambda: api, exceptions=S(ApiException=ApiException))
""")


PROGRAM = """
import sys
folder, port = sys.argv[1:]
sys.path.insert(0, folder)
from jax_rlhf.parallel import start_processes
from jax._src.clusters.k8s_cluster import K8sCluster
K8sCluster._namespace = classmethod(lambda cls: "default")  # from a file that only a Pod has
if port:  # as the API server would say
    K8sCluster.get_coordinator_address = classmethod(lambda cls, **_: f"127.0.0.1:{port}")
    K8sCluster.get_process_count = classmethod(lambda cls: 2)
try:
    start_processes()
except ValueError as error:
    print("refused:", error)
    raise SystemExit
import jax
print("joined:", jax.process_index(), jax.process_count(), jax.local_device_count())
"""


def pod(monkeypatch, folder, index, port=None):
    set_all(monkeypatch, POD | {"JOB_COMPLETION_INDEX": str(index), "HOSTNAME": "localhost"})
    return start(PROGRAM, folder, port or "", devices=4)


def test_with_the_kubernetes_package_each_pod_has_all_its_devices(asked, monkeypatch, tmp_path):
    kubernetes(tmp_path, "raise AssertionError('the address and the count are known')")
    port = free_port()
    pods = [pod(monkeypatch, tmp_path, index, port) for index in range(2)]
    for index, process in enumerate(pods):
        assert f"joined: {index} 2 4\n" in finish(process, timeout=120)


def test_pods_without_api_access_get_an_error_that_says_what_to_set(asked, monkeypatch, tmp_path):
    kubernetes(tmp_path, "raise ApiException")
    says = finish(pod(monkeypatch, tmp_path, 0), timeout=120)
    assert "refused: JAX cannot find the other Pods" in says
    assert "JAX_NUM_PROCESSES=1" in says
    assert "JAX_COORDINATOR_ADDRESS=HOST:8476" in says


def test_a_timeout_while_pods_join_is_not_a_user_error(asked, monkeypatch):
    """The error of JAX is passed on, and launchers start the same command again."""

    def never(*_, **__):
        raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")

    set_all(monkeypatch, POD | {"JOB_COMPLETION_INDEX": "1"})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: importlib.machinery.ModuleSpec(name, None))
    monkeypatch.setattr(module, "_has_tpu", lambda environment: False)
    monkeypatch.setattr(jax.distributed, "initialize", never)
    with pytest.raises(jax.errors.JaxRuntimeError):
        start_processes()


def test_a_process_waits_until_the_coordinators_name_resolves(asked, monkeypatch):
    answers = [OSError("Name or service not known")] * 2

    def look_up(host, port):
        assert host == "rlhf-0"
        if answers:
            raise answers.pop()

    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(module.socket, "getaddrinfo", look_up)
    monkeypatch.setattr(module.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: setattr(clock, "now", clock.now + seconds))
    start_processes("rlhf-0:8476", 2, 1)
    assert len(asked) == 1
    assert clock.now == 2.0

    answers = [OSError("Name or service not known")] * 1000
    with pytest.raises(
        ProcessError, match="the name of the coordinator, rlhf-0, cannot be resolved: Name or service"
    ) as error:
        start_processes("rlhf-0:8476", 2, 1)
    assert error.value.internal  # exit code 70: launchers restart the run
    assert 300 < clock.now < 310


def test_an_error_before_processes_join_does_not_start_devices(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: pytest.fail("it would start the devices"))
    assert exit_process(1, ValueError("JAX_NUM_PROCESSES")) == 1


def test_a_wrong_variable_ends_the_program_with_exit_code_1(tmp_path):
    command = [sys.executable, "-m", "jax_rlhf", "--config=configs/quickstart.py", f"--workdir={tmp_path / 'run'}"]
    environment = os.environ | TOLD | {"JAX_PLATFORMS": "cpu", "JAX_NUM_PROCESSES": json.dumps("two")}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 1
    assert "error: the environment variable JAX_NUM_PROCESSES is" in run.stderr
    assert "Traceback" not in run.stderr
