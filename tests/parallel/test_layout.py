"""The table of shardings, the allowed sizes of a mesh, and the rows of each process."""

import dataclasses
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jax_rlhf import RLHFEngine
from jax_rlhf.models import Decoder, init_params
from jax_rlhf.models.split import SplitModel
from jax_rlhf.optim.config import OptimizerConfig
from jax_rlhf.optim.optimizer import create_optimizer
from jax_rlhf.parallel import (
    LOGICAL_TO_MESH,
    MeshConfig,
    RolloutMeshConfig,
    create_layout,
    layout,
    local_row_indices,
    machine_of,
    owned_rows,
    rollout_layout,
    tensor_has_fast_links,
)
from jax_rlhf.parallel.processes import cluster_name, start_processes
from jax_rlhf.ppo.initialize import on_layout, whole_shardings
from jax_rlhf.sampling import rollout_form
from tests.plan.tiny import topology
from tests.ppo import tiny


def form(data=1, fsdp=1, tensor=1, rules=(), rollout=None):
    return create_layout(MeshConfig(data=data, fsdp=fsdp, tensor=tensor, rules=rules), rollout)


def test_the_documented_table_equals_the_table_in_code():
    documented = {}
    for names, axes in re.findall(r"^\| ([a-z_, ]+) \| [^|]* \| ([a-z, —]+) \|$", layout.__doc__, re.MULTILINE):
        if names != "logical axis":
            documented |= {name: tuple(re.findall(r"[a-z]+", axes)) for name in names.split(", ")}
    assert documented == dict(LOGICAL_TO_MESH)


def test_rules_override_entries_of_the_table():
    changed = form(2, 2, 2, rules=("mlp=tensor+fsdp", "embed="))
    assert changed.spec(("embed", "mlp")) == PartitionSpec(None, ("tensor", "fsdp"))
    assert form(2, 2, 2).spec(("embed", "mlp")) == PartitionSpec("fsdp", "tensor")
    for rule in ("mpl=tensor", "mlp=tensors", "mlp"):
        with pytest.raises(ValueError, match=r"config\.mesh\.rules: .* logical one of vocab, heads"):
            form(2, 2, 2, rules=(rule,))


def test_an_activation_is_sharded_only_over_axes_that_divide_it():
    assert form(2, 2, 2).spec(("rows", "length"), (6, 5)) == PartitionSpec("data")
    assert form(2, 2, 2).spec(("rows", "length"), (8, 5)) == PartitionSpec(("data", "fsdp"))
    assert form(2, 2, 2).spec(("rows", "heads"), (3, 3)) == PartitionSpec()


@pytest.mark.parametrize(
    ("sizes", "kv_heads", "wanted"),
    [
        ((1, 8, 1), 8, (1, 8)),  # data × tensor
        ((1, 8, 1), 4, (2, 4)),
        ((1, 8, 1), 3, (8, 1)),
        ((2, 4, 1), 2, (4, 2)),
        ((2, 2, 2), 4, (2, 4)),
        ((8, 1, 1), 8, (8, 1)),
    ],
)
def test_sampling_uses_fsdp_as_tensor_up_to_the_heads_then_as_data(sizes, kv_heads, wanted):
    chosen = rollout_layout(form(*sizes), (kv_heads, 24 if kv_heads == 3 else 32, 64))
    assert (chosen.num_shards("rows"), chosen.num_shards("heads")) == wanted
    assert chosen.num_shards("embed") == 1
    assert chosen.mesh.devices.flatten().tolist() == form(*sizes).mesh.devices.flatten().tolist()


@pytest.mark.parametrize(
    ("machines", "sizes", "wanted"),  # machines × GPUs; data × fsdp × tensor; data × tensor
    [
        ("h100:4x8", (1, 32, 1), (4, 8)),
        ("h100:2x4", (1, 8, 1), (2, 4)),
        ("h100:2x6", (1, 12, 1), (2, 6)),
        ("h100:2x6", (1, 4, 3), (2, 6)),
        ("h100:4x2", (1, 2, 4), (2, 4)),  # tensor spans machines in training already, and does not grow
        ("h100:1x8", (1, 8, 1), (1, 8)),
        ("v5e:4x4", (1, 16, 1), (1, 16)),
        ("2*v5e:2x4", (2, 8, 1), (2, 8)),
    ],
)
def test_tensor_grows_only_within_fast_links(machines, sizes, wanted):
    described = topology(machines)
    mesh = MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2])
    chosen = rollout_layout(
        create_layout(mesh, None, described.devices, devices_per_machine=described.devices_per_machine), (96, 96, 96)
    )
    assert (chosen.num_shards("rows"), chosen.num_shards("heads")) == wanted
    assert tensor_has_fast_links(chosen) == (machines != "h100:4x2")


@dataclasses.dataclass(frozen=True)
class Card:
    """A GPU. Its machine's index is in the attribute `named`: partition_index, or slice_index in an older JAX."""

    id: int
    platform = "gpu"

    def __getattr__(self, name):
        if name in ("partition_index", "slice_index"):
            return self.id // 4 if name == self.named else None
        raise AttributeError(name)


@pytest.mark.parametrize("named", ["partition_index", "slice_index"])
def test_gpus_report_the_machine_that_they_are_in(named):
    kind = type("Card", (Card,), {"named": named})
    cards = [kind(index) for index in range(8)]
    assert [machine_of(card) for card in cards] == [0] * 4 + [1] * 4
    assert machine_of(cards[5], devices_per_machine=2) == 2
    assert [machine_of(device) for device in jax.devices()] == [0] * 8


def test_an_impossible_rollout_mesh_is_an_error():
    with pytest.raises(ValueError, match=r"config\.rollout_mesh: data=8 .* is not the 8 devices"):
        form(1, 8, 1, rollout=RolloutMeshConfig(data=8, fsdp=1, tensor=2))
    with pytest.raises(ValueError, match=r"config\.rollout_mesh: .* tensor may be 2, 4\."):
        form(2, 2, 2, rollout=RolloutMeshConfig(data=1, fsdp=1, tensor=8))
    with pytest.raises(ValueError, match=r"rollout_mesh\.tensor=8 .*; 1, 2, 4 would"):
        rollout_layout(form(1, 8, 1, rollout=RolloutMeshConfig(tensor=-1)), (4, 8, 64))


@pytest.mark.parametrize("kept", [1, 2])
@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 4, 1), (1, 4, 2)])
def test_weights_reach_the_rollout_layout_unchanged_and_never_whole(sizes, kept, capfd):
    config = tiny.policy(num_heads=8, num_kv_heads=4).model.config
    plain = Decoder(config)
    params = init_params(plain, jax.random.key(0))
    tensor = 2 * sizes[2]
    where = form(*sizes, rollout=RolloutMeshConfig(data=-1, fsdp=kept, tensor=tensor))
    model = on_layout(plain, where)
    spread = jax.device_put(params, whole_shardings(SplitModel(model), where))
    moved = jax.jit(lambda params: rollout_form(model, params)[1])(spread)
    for path, leaf in jax.tree.leaves_with_path(rollout_form(plain, params)[1]):
        other = moved
        for part in path:
            other = other[part.key]
        np.testing.assert_array_equal(leaf, other)
    kernel = moved["layers_0"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size * kept * tensor == kernel.size
    assert "rematerialization" not in capfd.readouterr().err


# ---- rows and processes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "held", "owned"),
    [
        ((1, 8, 1), ([0, 1, 2, 3], [4, 5, 6, 7]), (4, 4)),
        ((1, 2, 4), ([0, 1, 2, 3], [4, 5, 6, 7]), (4, 4)),
        ((1, 1, 8), ([*range(8)], [*range(8)]), (8, 0)),  # tensor spans both machines
    ],
)
def test_the_mesh_determines_the_rows_of_each_process(sizes, held, owned, monkeypatch):
    machines = topology("h100:2x4").devices
    mesh = create_layout(MeshConfig(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))), None, machines)
    for process in range(2):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert local_row_indices(8, mesh).tolist() == held[process]
        assert owned_rows(8, mesh).sum() == owned[process]
    with pytest.raises(ValueError, match="a batch of 9 rows cannot be split over the mesh's"):
        local_row_indices(9, create_layout(MeshConfig(), None, machines))


def test_only_the_data_axis_spans_slices():
    slices = topology("2*v5e:2x4").devices
    mesh = create_layout(MeshConfig(data=2, fsdp=4, tensor=2), None, slices).mesh
    for part in range(2):
        assert {device.slice_index for device in mesh.devices[part].flatten()} == {part}
    with pytest.raises(ValueError, match=r"config\.mesh\.data=1 is not a multiple of the 2 TPU slices"):
        create_layout(MeshConfig(), None, slices)


def test_clusters_are_recognised_by_their_environment_variables():
    slurm = {"SLURM_NTASKS": "4", "SLURM_PROCID": "1", "SLURM_STEP_NODELIST": "node[1-2]"}
    assert cluster_name(slurm) == "slurm"
    assert cluster_name(slurm | {"SLURM_NTASKS": "1"}) is None
    assert cluster_name({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"}) is None  # in an allocation, but not started by srun
    assert cluster_name({"OMPI_COMM_WORLD_SIZE": "2"}) == "ompi"
    assert cluster_name({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}) == "k8s"
    assert cluster_name({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}) is None  # a notebook in a Pod is a single process
    assert cluster_name({}) is None


@pytest.mark.parametrize(
    ("flags", "before", "after"),
    [
        ("--xla_dump_to=x --xla_force_host_platform_device_count=8", None, "32"),
        ("--xla_force_host_platform_device_count=8", "5", "5"),
        ("--xla_force_host_platform_device_count=1", None, None),
        ("", None, None),
    ],
)
def test_simulated_devices_get_four_threads_each_by_default(monkeypatch, flags, before, after):
    monkeypatch.setenv("PJRT_NPROC", before or "")  # so that monkeypatch restores it
    if before is None:
        monkeypatch.delenv("PJRT_NPROC")
    monkeypatch.setenv("XLA_FLAGS", flags)
    start_processes()
    assert os.environ.get("PJRT_NPROC") == after


# ---- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("devices", [1, 8])
def test_offloaded_models_are_in_host_memory_and_give_the_same_results(devices):
    where = None if devices == 1 else form(2, 4, 1)
    models = {
        "reference": tiny.policy(3),
        "critic": tiny.policy(4, head="scalar"),
        "reward": tiny.policy(5, head="scalar"),
    }
    prompts = tiny.ragged_prompts(8)
    scores = []
    for offloaded in ((), ("reference", "reward")):
        engine = RLHFEngine(tiny.policy(), **models, offloaded=offloaded, mesh=where)
        made = tiny.trainer(engine, reward=None).generate_experience(prompts)
        scores.append((np.asarray(made.ref_logprobs), np.asarray(made.scores)))
        for part in (engine.params.frozen.reference, engine.params.frozen.reward):
            kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(part)}
            assert kinds == ({"pinned_host"} if offloaded else {"device"})
    np.testing.assert_array_equal(scores[0][0], scores[1][0])
    np.testing.assert_array_equal(scores[0][1], scores[1][1])


def test_the_first_moment_may_be_stored_in_bfloat16():
    params = {"kernel": jnp.ones((4, 4)), "scalar_head": {"kernel": jnp.ones((4, 1))}}
    for form_of_eps in ("pytorch", "tensorflow"):
        options = {"learning_rate": 0.1, "eps_form": form_of_eps}
        steps = []
        for dtype in ("float32", "bfloat16"):
            optimizer = create_optimizer(OptimizerConfig(**options, first_moment_dtype=dtype))
            state = optimizer.init(params)
            moments = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (4, 4)]
            assert sorted(str(leaf.dtype) for leaf in moments) == sorted([dtype, "float32"])
            gradient = jax.tree.map(lambda leaf: 0.3 * leaf, params)
            steps.append(optimizer.update(gradient, state, params, step=0)[0]["kernel"])
        np.testing.assert_allclose(steps[0], steps[1], rtol=1e-2)
        assert (steps[0] != 0).all()
