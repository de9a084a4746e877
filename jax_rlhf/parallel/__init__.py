"""Where arrays live on a mesh."""

from jax_rlhf.parallel.layout import LOGICAL_TO_MESH, Layout, as_layout, constrained, rollout_layout
from jax_rlhf.parallel.mesh import MeshConfig, RolloutMeshConfig, create_layout, create_mesh
from jax_rlhf.parallel.partition import gather_to_host, kept_in_place, padded_vocab_size, places_of, shardings
from jax_rlhf.parallel.rows import local_rows, put_rows, row_shards

__all__ = [
    "LOGICAL_TO_MESH",
    "Layout",
    "MeshConfig",
    "RolloutMeshConfig",
    "as_layout",
    "constrained",
    "create_layout",
    "create_mesh",
    "gather_to_host",
    "kept_in_place",
    "local_rows",
    "padded_vocab_size",
    "places_of",
    "put_rows",
    "rollout_layout",
    "row_shards",
    "shardings",
]
