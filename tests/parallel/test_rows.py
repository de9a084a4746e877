"""Row groups of a batch: each device has its own rows in every group."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jax_rlhf.parallel import join_row_groups, map_row_groups, put_rows, split_row_groups


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_device_keeps_its_own_rows_in_every_group(shards, count):
    mesh = None if shards == 1 else Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "fsdp"))
    rows = np.arange(24 * 5, dtype=np.float32).reshape(24, 5)
    groups = np.asarray(split_row_groups(put_rows(rows, mesh), count, mesh))
    assert groups.shape == (count, 24 // count, 5)
    np.testing.assert_array_equal(np.sort(groups.reshape(24, 5), axis=0), rows)
    for group in groups:
        for shard, part in enumerate(np.split(group[:, 0] // 5, shards)):
            assert set(part // (24 // shards)) == {shard}
    np.testing.assert_array_equal(join_row_groups(split_row_groups(put_rows(rows, mesh), count, mesh), mesh), rows)


@pytest.mark.parametrize("shards", [1, 4])
def test_a_function_applied_by_row_groups_gives_the_same_result(shards):
    mesh = None if shards == 1 else Mesh(np.array(jax.devices()[:4]).reshape(4, 1), ("data", "fsdp"))
    rows = np.random.RandomState(0).randn(16, 3).astype(np.float32)
    run = jax.jit(lambda x: map_row_groups(lambda part: (part.sum(axis=1), -part), x, 4, mesh))
    total, negative = run(put_rows(rows, mesh))
    np.testing.assert_allclose(total, rows.sum(axis=1), rtol=1e-6)
    np.testing.assert_array_equal(negative, -rows)
    text = run.lower(put_rows(rows, mesh)).compile().as_text()
    assert not any(
        name in text for name in ("all-gather", "all-to-all", "collective-permute")
    )  # no rows move between devices
