"""`launch/tpu_vm.sh up` and `down` in the different states of a TPU VM and a queued resource."""

import pytest

WHERE = "--name=rlhf", "--zone=us-east5-a"
VM = *WHERE, "--type=v5p-16"


@pytest.mark.parametrize(
    ("kind", "version"),
    [
        ("v5p-16", "v2-alpha-tpuv5"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v6e-8", "v2-alpha-tpuv6e"),
        ("v4-32", "tpu-ubuntu2204-base"),
    ],
)
def test_up_creates_a_vm_with_the_right_runtime_and_waits_for_it(world, kind, version):
    world.run("tpu_vm.sh", "up", *WHERE, f"--type={kind}", "--project=p", "--spot", "--create-flag=--network=n e t")
    (create,) = world.calls("tpu-vm", "create", "rlhf", "--zone=us-east5-a", "--project=p")
    assert {f"--accelerator-type={kind}", f"--version={version}", "--spot", "--network=n e t"} <= set(
        create["arguments"]
    )
    assert len(world.calls("tpu-vm", "describe")) == 3  # not found, CREATING, READY


def test_a_vm_that_is_ready_is_reused(world):
    world.set(**{"tpu-vm": ["READY"]})
    world.run("tpu_vm.sh", "up", *VM)
    assert not world.calls("create")


def test_a_stopped_vm_is_started(world):
    world.set(**{"tpu-vm": ["STOPPED"]})
    world.run("tpu_vm.sh", "up", *VM)
    assert world.calls("tpu-vm", "start", "rlhf")
    assert not world.calls("create")


def test_a_vm_in_an_unknown_state_is_left_alone(world):
    world.set(**{"tpu-vm": ["UNKNOWN"]})
    errors = world.run("tpu_vm.sh", "up", *VM, expect=1).stderr
    assert "rlhf is UNKNOWN" in errors
    assert not world.calls("create")
    assert not world.calls("delete")


def test_up_waits_for_a_queued_resource(world):
    world.run("tpu_vm.sh", "up", *VM, "--queued", "--spot")
    (create,) = world.calls("queued-resources", "create", "rlhf", "--node-id=rlhf", "--spot")
    assert {"--accelerator-type=v5p-16", "--runtime-version=v2-alpha-tpuv5"} <= set(create["arguments"])
    assert not world.calls("tpu-vm", "create")


def test_a_suspended_queued_resource_is_deleted_and_created_again(world):
    world.set(**{"queued-resources": ["SUSPENDED"]})
    world.run("tpu_vm.sh", "up", *VM, "--queued")
    verbs = [c["arguments"][3] for c in world.calls("gcloud", "queued-resources") if "describe" not in c["arguments"]]
    assert verbs == ["delete", "create"]
    assert world.calls("queued-resources", "delete", "--force", "--quiet")


def test_a_failed_creation_suggests_the_option_queued(world):
    world.set(failures=[["tpu-vm create", None, 1]])
    assert "if there is no capacity, --queued waits" in world.run("tpu_vm.sh", "up", *VM, expect=1).stderr


def test_a_vm_that_another_command_creates_meanwhile_is_used(world):
    world.set(failures=[["tpu-vm create", "READY", 1]])
    world.run("tpu_vm.sh", "up", *VM)
    assert len(world.calls("tpu-vm", "create")) == 1
    assert not world.calls("delete")


def test_a_failed_state_query_is_an_error_and_creates_nothing(world):
    world.set(failures=[["describe", None, 1]])
    assert "ERROR: played" in world.run("tpu_vm.sh", "up", *VM, expect=1).stderr
    assert not world.calls("create")


def test_down_deletes_the_vm(world):
    world.set(**{"tpu-vm": ["READY"]})
    world.run("tpu_vm.sh", "down", *WHERE)
    assert world.calls("tpu-vm", "delete", "rlhf", "--zone=us-east5-a")
    assert not world.calls("queued-resources", "delete")
    assert "there is no rlhf" in world.run("tpu_vm.sh", "down", *WHERE).stderr


def test_down_deletes_a_queued_resource_with_its_vm(world):
    world.set(**{"tpu-vm": ["READY"], "queued-resources": ["ACTIVE"]})
    world.run("tpu_vm.sh", "down", *WHERE)
    assert world.calls("queued-resources", "delete", "rlhf", "--force")
    assert not world.calls("tpu-vm", "delete")
