"""The memory of devices and hosts for a whole phase, computed from shapes without compiling."""

import functools

import pytest

from jax_rlhf.plan.__main__ import _slow_rollout_note
from jax_rlhf.plan.abstract import device_bytes
from jax_rlhf.plan.all_programs import programs_of
from jax_rlhf.plan.collectives import Collective
from jax_rlhf.plan.host import host_accounts
from jax_rlhf.plan.report import Account
from jax_rlhf.plan.topology import layout_on
from tests.plan import tiny

KERNELS = 2 * (4 * 1024**2 + 3 * 1024 * 2048)
TABLE = 8192 * 1024
ACTOR, CRITIC = KERNELS + 2 * TABLE, KERNELS + TABLE


@functools.cache
def planned(folder, *flat, chips="h100:2x4"):
    topology = tiny.topology(chips)
    settings = tiny.settings(folder, **dict(flat))
    return topology, programs_of(settings, layout_on(topology, settings))


def named(programs, name):
    (found,) = (one for one in programs if f"{one.phase} {one.name}" == name)
    return found


def test_a_host_has_offloaded_models_and_the_checkpoint_in_memory(tmp_path):
    """Each of 2 hosts has half. Master weights and moments take 12 bytes per parameter, offloaded models 2."""
    topology, programs = planned(tmp_path, ("reward_model.offload", True))
    hosts = {host.phase: host for host in host_accounts(programs, topology)}
    assert {host.devices for host in hosts.values()} == {4}
    assert [hosts[phase].offloaded for phase in ("sft", "reward")] == [0, 0]
    assert hosts["ppo"].offloaded == pytest.approx(CRITIC * 2 / 2, rel=0.01)
    checkpoints = {"sft": ACTOR, "reward": CRITIC, "ppo": ACTOR + CRITIC}
    for phase, size in checkpoints.items():
        assert hosts[phase].checkpoint == pytest.approx(size * 12 / 2, rel=0.01)
        assert hosts[phase].memory == 4 * 1872e9 / 8
        assert hosts[phase].fits
    assert hosts["ppo"].peak == hosts["ppo"].offloaded + hosts["ppo"].checkpoint + hosts["ppo"].file


def test_one_gpu_has_no_export_but_its_host_has_offloaded_models(tmp_path):
    topology, programs = planned(tmp_path, ("reward_model.offload", True), chips="h100:1")
    assert [one.name for one in programs if one.phase == "ppo"][-1] == "update"
    (host,) = (host for host in host_accounts(programs, topology) if host.phase == "ppo")
    assert host.offloaded == pytest.approx(CRITIC * 2, rel=0.01)


@pytest.mark.parametrize("chips", ["h100:2x4", "v5e:2x4"])
def test_an_offloaded_model_is_on_the_device_only_while_it_scores(tmp_path, chips):
    """XLA counts the copy on TPUs. Described GPUs have no memory kinds, so there the plan adds the copy."""
    _, there = planned(tmp_path, chips=chips)
    _, waits = planned(tmp_path, ("reward_model.offload", True), chips=chips)
    size = CRITIC * 2 / 8
    for name in ("rollout", "scoring", "update", "export"):
        before, after = (named(programs, f"ppo {name}") for programs in (there, waits))
        parameters = [device_bytes(one.resident["parameters"]) for one in (before, after)]
        assert parameters[0] - parameters[1] == pytest.approx(size, rel=0.01)
        copied = size if chips.startswith("h100") and name == "scoring" else 0
        more = device_bytes(after.transient) - device_bytes(before.transient)
        assert more == pytest.approx(copied, rel=0.01)


def test_the_policy_is_on_the_devices_while_its_responses_are_scored(tmp_path):
    _, programs = planned(tmp_path)
    sizes = {one.name: device_bytes(one.resident["parameters"]) * 8 for one in programs if one.phase == "reward"}
    for name in ("responses", "response scores"):
        assert sizes[name] - sizes["step"] == pytest.approx(ACTOR * 2, rel=0.01)
    assert sizes["evaluation"] == sizes["export"] == sizes["step"]
    _, without = planned(tmp_path, ("reward.normalize_rows", 0))
    assert [one.name for one in without if one.phase == "reward"] == ["step", "evaluation", "export"]


def test_the_export_program_gathers_the_largest_tensor(tmp_path):
    _, programs = planned(tmp_path)
    for phase in ("sft", "reward", "ppo"):
        leaf, index, _, dtype = named(programs, f"{phase} export").arguments
        assert (leaf.size, index, dtype.itemsize) == (TABLE, None, 2)


def test_the_note_counts_only_network_collectives_while_sampling():
    sent = (
        Collective("all-reduce", 1000, 1.0, 8, 4, "jit(sample)/decode_127_turns/while/body/layers/mlp"),
        Collective("all-reduce", 300, 1.0, 4, 4, "jit(sample)/decode_127_turns/while/body/layers/mlp"),
        Collective("all-gather", 70, 1.0, 8, 4, "jit(sample)/layers/mlp"),
    )
    rollout = Account("ppo", "rollout", *(0.0,) * 8, collectives=sent, seconds={}, compile_seconds=0.0)
    assert "1,000 collectives go over the network" in _slow_rollout_note(rollout)
