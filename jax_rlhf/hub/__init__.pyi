from .checkpoint_error import CheckpointError as CheckpointError
from .families import config_from_hub as config_from_hub
from .pretrained import (
    Description as Description,
    Pretrained as Pretrained,
    describe_pretrained as describe_pretrained,
    load_pretrained as load_pretrained,
    save_pretrained as save_pretrained,
)
from .tokenizer import (
    decode as decode,
    end_ids as end_ids,
    ids_of as ids_of,
    other_ids as other_ids,
    response_end_ids as response_end_ids,
    tokenizer_of as tokenizer_of,
)
