"""Where arrays live on a mesh."""

from jax_rlhf.parallel.layout import LOGICAL_TO_MESH, Layout, as_layout, constrained, reshard_steps, rollout_layout
from jax_rlhf.parallel.mesh import MeshConfig, RolloutMeshConfig, create_layout, create_mesh
from jax_rlhf.parallel.partition import gather_to_host, kept_in_place, padded_vocab_size, places_of, shardings
from jax_rlhf.parallel.processes import (
    ProcessError,
    any_process,
    leave,
    same_everywhere,
    start_processes,
    summed,
    together,
)
from jax_rlhf.parallel.rows import (
    all_rows,
    batch_rows,
    held_rows,
    joined_groups,
    local_rows,
    map_row_groups,
    owned_rows,
    put_rows,
    row_groups,
    row_shards,
)

__all__ = [
    "LOGICAL_TO_MESH",
    "Layout",
    "MeshConfig",
    "ProcessError",
    "RolloutMeshConfig",
    "all_rows",
    "any_process",
    "as_layout",
    "batch_rows",
    "constrained",
    "create_layout",
    "create_mesh",
    "gather_to_host",
    "held_rows",
    "joined_groups",
    "kept_in_place",
    "leave",
    "local_rows",
    "map_row_groups",
    "owned_rows",
    "padded_vocab_size",
    "places_of",
    "put_rows",
    "reshard_steps",
    "rollout_layout",
    "row_groups",
    "row_shards",
    "same_everywhere",
    "shardings",
    "start_processes",
    "summed",
    "together",
]
