"""The JobSets of launch/ against the types of the JobSet and Kubernetes APIs, and what they promise."""

import math

import pytest
import yaml

from tests.processes import ROOT

CHIPS = {"gke_jobset.yaml": "google.com/tpu", "gpu_jobset.yaml": "nvidia.com/gpu"}


@pytest.fixture(params=CHIPS)
def file(request):
    return request.param


@pytest.fixture
def jobset(file):
    return read(file)


def read(file):
    return yaml.safe_load((ROOT / "launch" / file).read_text())


def job_of(jobset):
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def pod_of(jobset):
    return job_of(jobset)["template"]["spec"]


def container_of(jobset):
    (container,) = pod_of(jobset)["containers"]
    return container


def variables(jobset):
    return {entry["name"]: entry.get("value") for entry in container_of(jobset)["env"]}


def missing(wanted, have, path=""):
    """Paths of `wanted` that `have` lacks or has otherwise."""
    if isinstance(wanted, dict) and isinstance(have, dict):
        return [line for key in wanted for line in missing(wanted[key], have.get(key), f"{path}.{key}")]
    if isinstance(wanted, list) and isinstance(have, list) and len(wanted) == len(have):
        pairs = enumerate(zip(wanted, have, strict=True))
        return [line for i, (w, h) in pairs for line in missing(w, h, f"{path}[{i}]")]
    return [] if wanted == have else [path]


def test_it_is_a_jobset_as_the_api_defines_it(jobset):
    reason = "kubeflow-trainer-api, which has the JobSet API's types, is not installed: requirements-dev.txt"
    models = pytest.importorskip("kubeflow_trainer_api.models", reason=reason)

    def unknown(jobset):
        read = models.JobsetV1alpha2JobSet.from_dict(jobset)  # checks types and required fields
        return missing(jobset, read.to_dict())  # which drops the fields that the API does not have

    assert not unknown(jobset)
    jobset["spec"]["failurePolicy"]["maxRestart"] = 1
    assert unknown(jobset) == [".spec.failurePolicy.maxRestart"]


def test_each_machine_of_a_slice_has_a_pod_with_all_its_chips():
    jobset = read("gke_jobset.yaml")
    job, container = job_of(jobset), container_of(jobset)
    chips = math.prod(
        int(side) for side in pod_of(jobset)["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    )
    assert job["completions"] == job["parallelism"] == chips / container["resources"]["limits"]["google.com/tpu"]
    assert job["completionMode"] == "Indexed"


def test_where_slices_are_counted_the_mesh_is_told_of_them():
    lines = (ROOT / "launch" / "gke_jobset.yaml").read_text().splitlines()
    (at,) = (number for number, line in enumerate(lines) if line.strip().startswith("replicas:"))
    assert "--config.mesh.data=2" in " ".join(lines[at - 2 : at])


def test_the_gpu_pods_know_where_pod_0_is_and_how_many_they_are():
    """As `start_processes` reads it; JobSet calls Pods JOBSET-JOB-INDEX-POD, in a domain of the JobSet's name."""
    jobset = read("gpu_jobset.yaml")
    job, told, name = job_of(jobset), variables(jobset), jobset["metadata"]["name"]
    (replicated,) = jobset["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 1  # the completion index then is the process's number
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"] == int(told["JAX_NUM_PROCESSES"])
    host, port = told["JAX_COORDINATOR_ADDRESS"].split(":")
    assert host == f"{name}-{replicated['name']}-0-0.{name}"
    (own,) = (entry["valueFrom"] for entry in container_of(jobset)["env"] if entry["name"] == "JAX_PROCESS_ID")
    assert own["fieldRef"]["fieldPath"] == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert jobset["spec"]["network"]["enableDNSHostnames"]
    assert {entry["containerPort"] for entry in container_of(jobset)["ports"]} == {int(port)}
    assert max(map(len, host.split("."))) <= 63  # of a name in DNS


def test_a_saved_or_preempted_run_starts_again_and_an_error_of_the_user_does_not(jobset):
    job = job_of(jobset)
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    # A Pod that fails takes its Job with it, which restarts the JobSet, unless a rule here says otherwise.
    assert job["backoffLimit"] == 0
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    (rule,) = policy["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    preempted, wrong = job["podFailurePolicy"]["rules"]
    assert (preempted["action"], preempted["onPodConditions"][0]["type"]) == ("Count", "DisruptionTarget")
    assert (wrong["action"], wrong["onExitCodes"]["values"]) == ("FailJob", [1, 2])
    assert wrong["onExitCodes"]["containerName"] == container_of(jobset)["name"]


def test_the_program_itself_gets_the_signal_and_writes_to_storage_that_outlives_the_pods(jobset):
    pod, container = pod_of(jobset), container_of(jobset)
    assert container["command"] == ["python", "-m", "jax_rlhf"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert mounts.keys() == volumes.keys()
    assert "persistentVolumeClaim" in volumes["shared"]
    config, workdir = (argument.partition("=")[2] for argument in container["args"])
    assert workdir.startswith(f"{mounts['shared']}/")
    assert (ROOT / config).is_file()
    assert variables(jobset)["JAX_COMPILATION_CACHE_DIR"] == f"{workdir}/compile_cache"
    if "shm" in volumes:
        assert (mounts["shm"], volumes["shm"]["emptyDir"]["medium"]) == ("/dev/shm", "Memory")


def test_it_asks_for_what_it_uses_and_gets_no_power_over_the_cluster(jobset, file):
    pod, resources = pod_of(jobset), container_of(jobset)["resources"]
    asked, most = resources["requests"], resources["limits"]
    assert {"cpu", "memory", "ephemeral-storage", CHIPS[file]} == asked.keys()
    assert asked[CHIPS[file]] == most[CHIPS[file]]
    assert asked["ephemeral-storage"] == most["ephemeral-storage"]
    assert pod["serviceAccountName"]
    assert pod["automountServiceAccountToken"] is False
