"""launch/gke_jobset.yaml against the types of the JobSet and Kubernetes APIs, and what it promises."""

import math

import pytest
import yaml

from tests.processes import ROOT


@pytest.fixture
def jobset():
    return yaml.safe_load((ROOT / "launch" / "gke_jobset.yaml").read_text())


def job_of(jobset):
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


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


def test_each_machine_of_a_slice_has_a_pod_with_all_its_chips(jobset):
    job = job_of(jobset)
    pod = job["template"]["spec"]
    chips = math.prod(int(side) for side in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    (container,) = pod["containers"]
    assert job["completions"] == job["parallelism"] == chips / container["resources"]["limits"]["google.com/tpu"]
    assert job["completionMode"] == "Indexed"


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
    (container,) = job["template"]["spec"]["containers"]
    assert wrong["onExitCodes"]["containerName"] == container["name"]


def test_the_program_itself_gets_the_signal_and_writes_to_storage_that_outlives_the_pods(jobset):
    pod = job_of(jobset)["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["python", "-m", "jax_rlhf"]
    (mount,) = container["volumeMounts"]
    (volume,) = pod["volumes"]
    assert volume["name"] == mount["name"]
    assert "persistentVolumeClaim" in volume
    assert f"--workdir={mount['mountPath']}/" in " ".join(container["args"])
    config = container["args"][0].removeprefix("--config=")
    assert (ROOT / config).is_file()
