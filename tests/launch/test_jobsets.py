"""The JobSets in launch/ match the types of the JobSet and Kubernetes APIs, and have the settings that runs need."""

import copy
import importlib
import math
import re
from pathlib import Path

import pytest
import yaml

from tests.processes import ROOT

ACCELERATORS = "google.com/tpu", "nvidia.com/gpu"
FILES = {"tpu": ROOT / "launch" / "gke_jobset.yaml", "gpu": ROOT / "launch" / "gpu_jobset.yaml"}


def documents(kind):
    return {document["kind"]: document for document in yaml.safe_load_all(FILES[kind].read_text())}


@pytest.fixture(params=FILES)
def both(request):
    """The documents of each file in turn, by kind."""
    return documents(request.param)


@pytest.fixture
def jobset(both):
    return both["JobSet"]


def job_of(jobset):
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def container_of(jobset):
    (container,) = job_of(jobset)["template"]["spec"]["containers"]
    return container


def variables(jobset):
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container_of(jobset)["env"]}


def missing(wanted, have, path=""):
    """The paths in `wanted` whose values are missing or different in `have`."""
    if isinstance(wanted, dict) and isinstance(have, dict):
        return [line for key in wanted for line in missing(wanted[key], have.get(key), f"{path}.{key}")]
    if isinstance(wanted, list) and isinstance(have, list) and len(wanted) == len(have):
        pairs = enumerate(zip(wanted, have, strict=True))
        return [line for i, (w, h) in pairs for line in missing(w, h, f"{path}[{i}]")]
    return [] if wanted == have else [path]


def test_the_manifests_match_the_types_of_the_apis(both):
    reason = "kubeflow-trainer-api, which has the JobSet API's types, is not installed: requirements-dev.txt"
    models = pytest.importorskip("kubeflow_trainer_api.models", reason=reason)
    types = {"JobSet": models.JobsetV1alpha2JobSet, "ServiceAccount": models.IoK8sApiCoreV1ServiceAccount}

    def unknown(document):
        read = types[document["kind"]].from_dict(document)  # checks types and required fields
        return missing(document, read.to_dict())  # to_dict drops unknown fields

    assert both.keys() == types.keys()
    assert [unknown(document) for document in both.values()] == [[], []]
    wrong = copy.deepcopy(both["JobSet"])
    wrong["spec"]["failurePolicy"]["maxRestart"] = 1
    container_of(wrong)["resource"] = {}
    (pod,) = (".spec.replicatedJobs[0].template.spec.template.spec",)
    assert unknown(wrong) == [".spec.failurePolicy.maxRestart", f"{pod}.containers[0].resource"]


def test_each_machine_of_a_slice_has_a_pod_with_all_its_chips():
    job = job_of(documents("tpu")["JobSet"])
    pod = job["template"]["spec"]
    chips = math.prod(int(side) for side in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    (container,) = pod["containers"]
    assert job["completions"] == job["parallelism"] == chips / container["resources"]["limits"]["google.com/tpu"]
    assert job["completionMode"] == "Indexed"


def test_the_comments_contain_the_flags_for_two_slices():
    text = FILES["tpu"].read_text()
    (line,) = re.findall(r"^ *replicas: (.*)$", text, flags=re.MULTILINE)
    assert line.startswith("1 # CHANGE")
    assert "--config.mesh.data=2" in line
    with_two = re.sub(r"^( +)# - --", r"\1- --", text.replace(f"replicas: {line}", "replicas: 2"), flags=re.MULTILINE)
    *_, jobset = yaml.safe_load_all(with_two)
    (replicated,) = jobset["spec"]["replicatedJobs"]
    assert f"--config.mesh.data={replicated['replicas']}" in container_of(jobset)["args"]
    assert rows_that_do_not_fit(jobset) == []
    assert rows_that_do_not_fit(documents("tpu")["JobSet"]) == []
    jobset["spec"]["replicatedJobs"][0]["replicas"] = 4  # the flags are those of two slices
    assert rows_that_do_not_fit(jobset) == ["sft", "reward"]


def rows_that_do_not_fit(jobset):
    """Sections whose microbatch size is not a multiple of the devices, or does not divide the batch size."""
    flags = dict(argument.removeprefix("--config.").split("=") for argument in container_of(jobset)["args"])
    config = importlib.import_module("configs.llama3_8b").get_config()
    (per_pod,) = [n for kind, n in container_of(jobset)["resources"]["limits"].items() if kind in ACCELERATORS]
    (replicated,) = jobset["spec"]["replicatedJobs"]
    devices = per_pod * job_of(jobset)["completions"] * replicated["replicas"]
    wrong = []
    for section, batch in (("sft", config.data.sft_batch_size), ("reward", config.data.reward_batch_size)):
        rows = int(flags.get(f"{section}.microbatch_size", config[section].microbatch_size))
        if rows % devices or batch % rows:
            wrong.append(section)
    return wrong


def rendezvous(jobset):
    """The errors that keep the Pods of the GPU JobSet from finding each other."""
    name, spec, told = jobset["metadata"]["name"], jobset["spec"], variables(jobset)
    (replicated,) = spec["replicatedJobs"]
    job, wrong = job_of(jobset), []
    ports = [port["containerPort"] for port in container_of(jobset)["ports"]]
    if told["JAX_COORDINATOR_ADDRESS"] not in [f"{name}-{replicated['name']}-0-0.{name}:{port}" for port in ports]:
        wrong.append("the coordinator is not the Pod of index 0, at a port of the container")
    if not spec["network"]["enableDNSHostnames"] or not spec["network"]["publishNotReadyAddresses"]:
        wrong.append("Pods have no names, or not before they are ready")
    if not told["JAX_NUM_PROCESSES"] == str(job["completions"]) == str(job["parallelism"]):
        wrong.append("processes are not as many as Pods")
    if replicated["replicas"] != 1 or job["completionMode"] != "Indexed":
        wrong.append("indices are not those of processes")
    where = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    if told["JAX_PROCESS_ID"] != where:
        wrong.append("a process does not know its number")
    return wrong


def test_gpu_pods_find_each_other_without_a_service_account_token():
    jobset = documents("gpu")["JobSet"]
    assert rendezvous(jobset) == []
    assert rows_that_do_not_fit(jobset) == []
    assert job_of(jobset)["template"]["spec"]["automountServiceAccountToken"] is False


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda j: j["metadata"].update(name="other"), "coordinator"),
        (lambda j: j["spec"]["replicatedJobs"][0].update(name="other"), "coordinator"),
        (lambda j: j["spec"]["replicatedJobs"][0].update(replicas=2), "indices"),
        (lambda j: container_of(j)["ports"][0].update(containerPort=1), "coordinator"),
        (lambda j: j["spec"]["network"].update(enableDNSHostnames=False), "names"),
        (lambda j: j["spec"]["network"].update(publishNotReadyAddresses=False), "names"),
        (lambda j: job_of(j).update(completions=3), "processes"),
        (lambda j: job_of(j).update(completions=3, parallelism=3), "processes"),
        (lambda j: job_of(j).update(completionMode="NonIndexed"), "indices"),
        (lambda j: container_of(j)["env"].append({"name": "JAX_PROCESS_ID", "value": "0"}), "number"),
    ],
)
def test_an_error_in_the_gpu_jobset_is_detected(change, found):
    jobset = documents("gpu")["JobSet"]
    change(jobset)
    (wrong,) = rendezvous(jobset)
    assert found in wrong


def test_gpu_pods_have_the_variables_of_gpu_sh_and_shared_memory():
    jobset = documents("gpu")["JobSet"]
    told = variables(jobset)
    for name in ("JAX_PLATFORMS", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        assert f"{name}=${{{name}:-{told[name]}}}" in (ROOT / "launch" / "gpu.sh").read_text()
    mounts = {mount["mountPath"]: mount["name"] for mount in container_of(jobset)["volumeMounts"]}
    (memory,) = [v for v in job_of(jobset)["template"]["spec"]["volumes"] if v["name"] == mounts["/dev/shm"]]
    assert memory["emptyDir"]["medium"] == "Memory"


def test_saved_and_preempted_runs_restart_but_user_errors_do_not(jobset):
    job = job_of(jobset)
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    # A failed Pod fails its Job, and that restarts the JobSet unless a rule says otherwise.
    assert job["backoffLimit"] == 0
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    (rule,) = policy["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    preempted, wrong = job["podFailurePolicy"]["rules"]
    assert (preempted["action"], preempted["onPodConditions"][0]["type"]) == ("Count", "DisruptionTarget")
    assert (wrong["action"], wrong["onExitCodes"]["values"]) == ("FailJob", [1, 2])
    assert wrong["onExitCodes"]["operator"] == "In"
    assert wrong["onExitCodes"]["containerName"] == container_of(jobset)["name"]


def test_a_pod_reserves_its_resources_and_has_no_api_token(both):
    jobset = both["JobSet"]
    resources = container_of(jobset)["resources"]
    assert resources["requests"] == resources["limits"]
    assert {"cpu", "memory", "ephemeral-storage"} < resources["requests"].keys()
    pod = job_of(jobset)["template"]["spec"]
    assert pod["serviceAccountName"] == both["ServiceAccount"]["metadata"]["name"]
    assert both["ServiceAccount"]["automountServiceAccountToken"] is pod["automountServiceAccountToken"] is False
    assert pod["terminationGracePeriodSeconds"] >= 300


def test_python_is_the_main_process_and_writes_to_a_persistent_volume(jobset):
    pod, container = job_of(jobset)["template"]["spec"], container_of(jobset)
    assert container["command"] == ["python", "-m", "jax_rlhf"]
    (workdir,) = [argument.partition("=")[2] for argument in container["args"] if argument.startswith("--workdir=")]
    assert variables(jobset)["JAX_COMPILATION_CACHE_DIR"] == f"{workdir}/compile_cache"
    (mount,) = [mount for mount in container["volumeMounts"] if Path(mount["mountPath"]) in Path(workdir).parents]
    (volume,) = [volume for volume in pod["volumes"] if volume["name"] == mount["name"]]
    assert "persistentVolumeClaim" in volume
    config = container["args"][0].removeprefix("--config=")
    assert (ROOT / config).is_file()


def test_both_jobsets_agree_on_what_does_not_depend_on_hardware():
    """A fix in one file must not be forgotten in the other."""
    one, other = (documents(kind) for kind in FILES)
    assert one["ServiceAccount"] == other["ServiceAccount"]
    assert one["JobSet"]["spec"]["failurePolicy"] == other["JobSet"]["spec"]["failurePolicy"]
    jobs = [job_of(documents["JobSet"]) for documents in (one, other)]
    for name in ("backoffLimit", "podFailurePolicy", "completionMode"):
        assert jobs[0][name] == jobs[1][name]
    pods = [job["template"]["spec"] for job in jobs]
    for name in (
        "restartPolicy",
        "serviceAccountName",
        "automountServiceAccountToken",
        "terminationGracePeriodSeconds",
    ):
        assert pods[0][name] == pods[1][name]
    containers = [container_of(documents["JobSet"]) for documents in (one, other)]
    for name in ("name", "image", "command", "args", "envFrom"):
        assert containers[0][name] == containers[1][name]
