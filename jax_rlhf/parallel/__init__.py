"""Where arrays live on a mesh."""

from jax_rlhf.parallel.mesh import MeshConfig, create_mesh
from jax_rlhf.parallel.partition import (
    LOGICAL_TO_MESH,
    gather_to_host,
    kept_in_place,
    padded_vocab_size,
    places_of,
    shardings,
)
from jax_rlhf.parallel.rows import local_rows, put_rows, row_shards

__all__ = [
    "LOGICAL_TO_MESH",
    "MeshConfig",
    "create_mesh",
    "gather_to_host",
    "kept_in_place",
    "local_rows",
    "padded_vocab_size",
    "places_of",
    "put_rows",
    "row_shards",
    "shardings",
]
