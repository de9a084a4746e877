"""Reads files, Hugging Face data sets and Python readers, and makes the batches of each training phase."""

from jax_rlhf.data.batches import PackedPairs, PairBatch, TextBatch, real_tokens
from jax_rlhf.data.config import DataConfig
from jax_rlhf.data.data_error import DataError
from jax_rlhf.data.datasets import Datasets, create_datasets
from jax_rlhf.data.sources import checked_name, imported
from jax_rlhf.data.tokens import Example, pad_id

__all__ = [
    "DataConfig",
    "DataError",
    "Datasets",
    "Example",
    "PackedPairs",
    "PairBatch",
    "TextBatch",
    "checked_name",
    "create_datasets",
    "imported",
    "pad_id",
    "real_tokens",
]
