"""Where arrays live on a mesh."""

from jax_rlhf.parallel.partition import LOGICAL_TO_MESH, gather_to_host, padded_vocab_size, shardings

__all__ = ["LOGICAL_TO_MESH", "gather_to_host", "padded_vocab_size", "shardings"]
