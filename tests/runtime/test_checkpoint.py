"""A checkpoint is either complete or ignored, and its checksums detect a changed bit."""

import errno
import math
import os
import resource
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from jax_rlhf.hub import CheckpointError
from jax_rlhf.parallel import MeshConfig, create_mesh
from jax_rlhf.runtime import checksum
from jax_rlhf.runtime.checkpoint import Checkpoints, abstract, leaves_by_path
from jax_rlhf.runtime.checksum import checksums
from jax_rlhf.runtime.config import CheckpointConfig
from jax_rlhf.runtime.notes import DamagedError, read_notes


def tree(value=0.0):
    random = np.random.RandomState(0)
    return {
        "weights": {"kernel": jnp.asarray(random.randn(64, 32) + value, jnp.float32)},
        "moment": jnp.asarray(random.randn(64, 32) + value, jnp.bfloat16),
        "count": jnp.int32(value),
        "done": jnp.asarray([True, False]),
    }


def equal(one, other):
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right))


def opened(folder, said=None, **config):
    return Checkpoints(
        folder / "checkpoints", CheckpointConfig(**config), print_line=(said if said is not None else []).append
    )


def saved(folder, *steps, **config):
    checkpoints = opened(folder, **config)
    for step in steps:
        checkpoints.save(step, tree(step), {"at": step})
    checkpoints.wait()
    checkpoints.close()


def test_a_checkpoint_is_on_the_disk_before_an_older_one_is_deleted(tmp_path, monkeypatch):
    """A power cut right after the deletion must leave a complete checkpoint."""
    saved(tmp_path, 1, keep=1)
    folder, happened = tmp_path / "checkpoints", []
    sync, where = os.fsync, Path("/proc/self/fd")

    def watched(handle):
        happened.append((os.readlink(where / str(handle)), (folder / "1").exists()))
        return sync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    checkpoints = opened(tmp_path, keep=1)
    checkpoints.save(2, tree(2), {"at": 2})
    checkpoints.wait()
    checkpoints.close()
    monkeypatch.undo()
    assert not (folder / "1").exists()
    files = {str(path) for path in [folder, folder / "2", *(folder / "2").rglob("*")] if path.name != "synced"}
    assert {path for path, old_is_there in happened if old_is_there} >= files


def test_a_save_is_correct_even_if_its_arrays_are_donated_at_once(tmp_path):
    add = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + jnp.ones_like(leaf), state), donate_argnums=0)
    state = {"a": jnp.arange(4_000_000, dtype=jnp.float32), "b": jnp.float32(0)}
    wanted = jax.tree.map(np.array, state)
    checkpoints = opened(tmp_path)
    checkpoints.save(3, state, {"notes": [1.5, "x"]})
    for _ in range(3):
        state = add(state)
    checkpoints.wait()
    restored = checkpoints.restore(abstract(state))
    checkpoints.close()
    assert (restored.step, restored.notes) == (3, {"notes": [1.5, "x"]})
    equal(restored.state, wanted)


def test_restore_returns_none_for_an_empty_folder(tmp_path):
    assert opened(tmp_path).restore(abstract(tree())) is None


@pytest.mark.parametrize(("before", "after"), [((8, 1, 1), (1, 4, 2)), ((1, 2, 4), (2, 2, 2))])
def test_a_checkpoint_can_be_restored_onto_another_mesh(tmp_path, before, after):
    def placed(sizes):
        mesh = create_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]))
        places = {"weights": {"kernel": PartitionSpec("fsdp", "tensor")}, "moment": PartitionSpec("fsdp")}
        places |= {"count": PartitionSpec(), "done": PartitionSpec()}
        return jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), tree(7), places)

    one, other = placed(before), placed(after)
    assert checksums(leaves_by_path(one)) == checksums(leaves_by_path(other)) == checksums(leaves_by_path(tree(7)))
    checkpoints = opened(tmp_path)
    checkpoints.save(1, one, {})
    checkpoints.wait()
    restored = checkpoints.restore(abstract(other)).state
    equal(restored, other)
    for left, right in zip(jax.tree.leaves(restored), jax.tree.leaves(other), strict=True):
        assert left.sharding == right.sharding
    checkpoints.close()


def test_checksums_detect_a_flipped_bit_and_swapped_rows():
    array = np.random.RandomState(0).randn(33, 5).astype(np.float32)
    whole = checksums({"a": jnp.asarray(array)})["a"]
    for place, bit in [((0, 0), 0), ((32, 4), 31), ((7, 3), 22)]:
        changed = array.copy()
        changed.view(np.uint32)[place] ^= np.uint32(1) << np.uint32(bit)
        assert checksums({"a": jnp.asarray(changed)})["a"] != whole
    changed = array.copy()
    changed[[3, 9]] = changed[[9, 3]]
    assert checksums({"a": jnp.asarray(changed)})["a"] != whole


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 1500), (4, 2000), (5, 2, 3, 4), (0, 3)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "bool", "uint8"])
def test_checksums_follow_their_definition_on_host_and_devices(shape, dtype):
    """The definition is Σ bits · weights mod 2³², computed here with Python integers."""
    array = jnp.asarray(np.random.RandomState(1).randn(*shape) * 50).astype(dtype)
    bits = np.asarray(array).view({1: np.uint8, 2: np.uint16, 4: np.uint32}[array.dtype.itemsize])
    weights = [checksum._weights(np, size, axis) for axis, size in enumerate(shape)]
    assert all(np.all(weight % 2 == 1) for weight in weights)
    wanted = 0
    for place in np.ndindex(*shape):
        wanted += int(bits[place]) * math.prod(int(weight[i]) for weight, i in zip(weights, place, strict=True))
    assert checksum._on_host({"a": array})["a"] == wanted % 2**32
    assert int(checksum._on_devices({"a": array})["a"]) == wanted % 2**32


def files(folder, step):
    """The files of a checkpoint that are not empty, the largest first."""
    found = [file for file in (folder / "checkpoints" / str(step)).rglob("*") if file.is_file() and file.stat().st_size]
    return sorted(found, key=lambda file: -file.stat().st_size)


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("damage", [flip, truncate, lambda file: file.unlink()])
@pytest.mark.parametrize("which", ["largest", "notes/metadata"])
def test_a_damaged_checkpoint_is_moved_away_and_the_last_good_one_used(tmp_path, damage, which):
    saved(tmp_path, 1, 2, 3, keep=3)
    notes = tmp_path / "checkpoints" / "3" / "notes" / "metadata"
    damage(notes if which != "largest" else files(tmp_path, 3)[0])
    said = []
    checkpoints = opened(tmp_path, said, keep=3)
    restored = checkpoints.restore(abstract(tree()))
    assert restored.step == 2
    assert restored.notes == {"at": 2}
    equal(restored.state, tree(2))
    assert "checkpoints/3 is damaged" in said[0]
    assert (tmp_path / "checkpoints.damaged" / "3").is_dir()
    checkpoints.save(3, tree(3), {"at": 3})  # the step can be saved again
    checkpoints.wait()
    checkpoints.close()
    assert opened(tmp_path, keep=3).restore(abstract(tree())).step == 3


def test_restore_finds_a_good_checkpoint_whichever_file_is_damaged(tmp_path):
    """Each file of checkpoint 3 is truncated in turn. Checkpoint 3 is restored if it does not need the file, else 2."""
    options = {"keep": 3, "best": "eval/score"}
    saved(tmp_path, 1, 2, 3, **options)
    every = files(tmp_path, 3)
    assert len(every) > 5
    found = []
    for file in every:
        whole = file.read_bytes()
        truncate(file)
        checkpoints = opened(tmp_path, **options)
        restored = checkpoints.restore(abstract(tree()))
        checkpoints.close()
        found.append(restored.step)
        equal(restored.state, tree(restored.step))
        aside = tmp_path / "checkpoints.damaged" / "3"
        if aside.exists():
            aside.rename(tmp_path / "checkpoints" / "3")
        file.write_bytes(whole)
    assert set(found) == {2, 3}


@pytest.mark.parametrize("error", [jax.errors.JaxRuntimeError("Connection closed by peer"), MemoryError("no more")])
def test_a_lost_process_or_memory_error_is_not_taken_for_damage(tmp_path, monkeypatch, error):
    saved(tmp_path, 1, 2)

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", fails)
    with pytest.raises(type(error), match=str(error)):
        opened(tmp_path).restore(abstract(tree()))
    assert opened(tmp_path).steps == [1, 2]


@pytest.mark.parametrize("error", [jax.errors.JaxRuntimeError("Connection closed by peer"), TimeoutError("no answer")])
def test_a_process_lost_during_a_save_is_not_taken_for_a_full_disk(tmp_path, monkeypatch, error):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(ocp.CheckpointManager, "save", fails)
    with pytest.raises(type(error), match=str(error)):
        opened(tmp_path).save(1, tree(), {})


def test_saving_does_not_query_the_preemption_service(tmp_path, monkeypatch):
    """The service keeps only the last query of each process. A query by a save would make the run miss a notice."""
    asked = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", asked.append)
    saved(tmp_path, 1, 2)
    assert opened(tmp_path).steps == [1, 2]
    assert asked == []


def test_restore_raises_if_all_checkpoints_are_damaged(tmp_path):
    saved(tmp_path, 1, 2)
    for step in (1, 2):
        flip(files(tmp_path, step)[0])
    with pytest.raises(CheckpointError, match=r"none of the checkpoints \(1, 2\) can be read.*--overwrite"):
        opened(tmp_path, []).restore(abstract(tree()))
    assert (tmp_path / "checkpoints" / "2").is_dir()


def test_a_checkpoint_of_another_model_is_an_error_but_not_damage(tmp_path):
    saved(tmp_path, 1, 2)
    other = tree() | {"moment": jnp.zeros((64, 33), jnp.bfloat16)}
    other["more"] = other.pop("done")
    with pytest.raises(CheckpointError, match=r"another model.*done was .* and would be missing; moment was .*32.*33"):
        opened(tmp_path).restore(abstract(other))


def test_an_incomplete_checkpoint_is_ignored_and_then_deleted(tmp_path):
    saved(tmp_path, 1)
    half = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp-0"
    (half / "state").mkdir(parents=True)
    checkpoints = opened(tmp_path)
    assert checkpoints.steps == [1]
    assert checkpoints.restore(abstract(tree())).step == 1
    checkpoints.save(2, tree(2), {})
    checkpoints.wait()
    checkpoints.close()
    assert not half.exists()


def test_the_last_the_periodic_and_the_best_checkpoints_are_kept(tmp_path):
    checkpoints = opened(tmp_path, keep=2, keep_every=4, best="eval/score")
    scores = {2: 0.5, 3: 0.9, 5: 0.1, 6: None, 7: math.nan, 9: 0.8}
    for step in range(1, 11):
        assert checkpoints.improves(scores.get(step)) == (step in (2, 3))
        checkpoints.save(step, tree(step), {}, scores.get(step))
    checkpoints.wait()
    assert checkpoints.steps == [3, 4, 8, 9, 10]
    checkpoints.close()
    checkpoints = opened(tmp_path, keep=2, keep_every=4, best="eval/score")  # after a restart
    assert [checkpoints.improves(score) for score in (0.89, 0.91)] == [False, True]
    for step in range(11, 14):
        checkpoints.save(step, tree(step), {}, 0.7)
    checkpoints.wait()
    assert checkpoints.steps == [3, 4, 8, 12, 13]
    checkpoints.close()


@pytest.mark.parametrize(
    ("best", "mode", "kept"), [("eval/loss", None, 2), ("eval/auc", "min", 2), ("eval/loss", "max", 3)]
)
def test_the_best_mode_follows_from_the_metrics_name_unless_it_is_set(tmp_path, best, mode, kept):
    checkpoints = opened(tmp_path, keep=1, best=best, best_mode=mode)
    for step, loss in enumerate([2.0, 1.0, 3.0, 2.5], 1):
        checkpoints.save(step, tree(step), {}, loss)
    checkpoints.wait()
    assert checkpoints.steps == [kept, 4]
    checkpoints.close()


def test_a_failed_write_names_the_last_complete_checkpoint(tmp_path):
    """A limit of 64 KiB per file makes the write fail as on a full disk."""
    checkpoints = opened(tmp_path)
    checkpoints.save(1, tree(1), {})
    checkpoints.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        checkpoints.save(2, {"a": jnp.asarray(np.random.RandomState(0).randn(500, 500))}, {})
        with pytest.raises(
            CheckpointError, match=r"step 2 could not be written: .*; the last complete one is of step 1"
        ):
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    checkpoints = opened(tmp_path)
    assert checkpoints.steps == [1]
    assert checkpoints.restore(abstract(tree())).step == 1


@pytest.mark.parametrize(("field", "value"), [("keep", 0), ("every", -1), ("minutes", 0.0)])
def test_an_error_names_the_wrong_setting(field, value):
    with pytest.raises(ValueError, match=rf"config.checkpoint.{field}={value}"):
        CheckpointConfig(**{field: value})


@pytest.mark.parametrize("synced", [True, False])
def test_a_save_that_a_power_cut_interrupted_is_dropped(tmp_path, synced):
    """Without the mark `synced` it is dropped, and the phase starts from step 0. With the mark it is an error."""
    saved(tmp_path, 1)
    folder = tmp_path / "checkpoints" / "1"
    if not synced:
        (folder / "synced").unlink()
    said = []
    checkpoints = opened(tmp_path, said)
    checkpoints.drop_unfinished()
    assert checkpoints.steps == [1]  # it is complete, even if the process was killed before setting the mark
    (folder / "notes" / "metadata").write_bytes(b"")
    checkpoints.drop_unfinished()
    if synced:
        with pytest.raises(CheckpointError, match="none of the checkpoints"):
            checkpoints.restore(abstract(tree()))
    else:
        assert checkpoints.restore(abstract(tree())) is None
        assert "was being written when the machine went down" in said[0]
        assert (tmp_path / "checkpoints.damaged" / "1").is_dir()
    checkpoints.close()


@pytest.mark.parametrize("fault", ["unreadable", "once", "no CPU"])
def test_a_checkpoint_that_cannot_be_read_at_the_moment_is_kept(tmp_path, monkeypatch, fault):
    """A read error, or a missing CPU backend, does not mean that the checkpoint is incomplete."""
    saved(tmp_path, 1)
    folder = tmp_path / "checkpoints" / "1"
    (folder / "synced").unlink()
    checkpoints = opened(tmp_path)
    if fault == "no CPU":
        devices = jax.local_devices

        def without(backend=None):
            if backend == "cpu":
                raise RuntimeError("Unknown backend: 'cpu'")
            return devices()

        monkeypatch.setattr(jax, "local_devices", without)
    else:
        failures = [DamagedError("[Errno 5] Input/output error")] * (1 if fault == "once" else 9)

        def failing(step):
            if failures:
                raise failures.pop()
            return read_notes(step)

        monkeypatch.setattr("jax_rlhf.runtime.completeness.read_notes", failing)
        if fault == "unreadable":
            monkeypatch.setattr("jax_rlhf.runtime.completeness.open", unreadable, raising=False)
    checkpoints.drop_unfinished()
    monkeypatch.undo()
    assert checkpoints.restore(abstract(tree())).step == 1
    checkpoints.close()


def unreadable(*_):
    raise OSError(errno.EIO, "Input/output error")


def test_of_several_damaged_checkpoints_none_is_dropped_as_unfinished(tmp_path):
    """The first was complete before the second was saved, so the run must not silently restart from step 0."""
    saved(tmp_path, 1, 2)
    for step in (1, 2):
        (tmp_path / "checkpoints" / str(step) / "synced").unlink()
        (tmp_path / "checkpoints" / str(step) / "notes" / "metadata").write_bytes(b"")
    checkpoints = opened(tmp_path)
    checkpoints.drop_unfinished()
    with pytest.raises(CheckpointError, match="none of the checkpoints"):
        checkpoints.restore(abstract(tree()))
    checkpoints.close()


def test_a_damaged_checkpoint_is_moved_to_a_folder_on_the_same_disk(tmp_path):
    """The folder `checkpoints` may be a link to a scratch disk."""
    saved(tmp_path, 1, 2)
    scratch = tmp_path / "scratch" / "run"
    scratch.parent.mkdir()
    (tmp_path / "checkpoints").rename(scratch)
    (tmp_path / "checkpoints").symlink_to(scratch)
    (scratch / "2" / "notes" / "metadata").write_bytes(b"")
    checkpoints = opened(tmp_path)
    assert checkpoints.restore(abstract(tree())).step == 1
    assert (tmp_path / "scratch" / "run.damaged" / "2").is_dir()
    checkpoints.close()
