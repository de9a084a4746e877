from .batches import (
    PackedPairs as PackedPairs,
    PairBatch as PairBatch,
    TextBatch as TextBatch,
)
from .config import DataConfig as DataConfig
from .data_error import DataError as DataError
from .datasets import Datasets as Datasets, create_datasets as create_datasets
from .sources import checked_name as checked_name, imported as imported
from .tokens import Example as Example, pad_id as pad_id
