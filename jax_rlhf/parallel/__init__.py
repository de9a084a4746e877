"""Where arrays live on a mesh."""

from jax_rlhf.parallel.partition import LOGICAL_TO_MESH, gather_to_host, padded_vocab_size, shardings
from jax_rlhf.parallel.rows import local_rows, put_rows, row_shards

__all__ = [
    "LOGICAL_TO_MESH",
    "gather_to_host",
    "local_rows",
    "padded_vocab_size",
    "put_rows",
    "row_shards",
    "shardings",
]
