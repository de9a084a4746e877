"""Limits on the sizes and ids in a config.json, checked before anything is built from it.

transformers allocates lists of as many layers, and tables of as many labels, as the file claims.
"""

from collections.abc import Mapping
from typing import Any

from jax_rlhf.hub.checkpoint_error import CheckpointError

MOST_IDS = 2**24
"""The largest allowed vocabulary; the largest real ones have 2¹⁸ tokens."""
_LAYERS, _LABELS, _WIDTH, _HEADS = 2**12, 2**12, 2**20, 2**14
_MOST = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "max_window_layers"), _LAYERS),
    **dict.fromkeys(("hidden_size", "n_embd", "intermediate_size", "n_inner", "ffn_dim"), _WIDTH),
    **dict.fromkeys(("word_embed_proj_dim", "d_model"), _WIDTH),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_key_value_heads", "head_dim"), _HEADS),
    "vocab_size": MOST_IDS,
    "num_labels": _LABELS,
}
"""The largest plausible sizes, under the names of all families."""
_LARGEST = 2**53
"""The largest value of any other whole number: a float still represents it exactly."""
_LONGEST = 2**14
"""The largest number of entries of any list or object within a config.json: layers, frequencies, labels."""
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_ID_LISTS = ("eos_token_id",)
_ABSENT = -1
"""The id that some checkpoints set for a token that they lack."""


def check_sizes(config: Mapping[str, Any]) -> None:
    """Checks that a config.json claims no implausible sizes.

    Args:
      config: the content of the file.

    Raises:
      CheckpointError: a size is too large; the message names the field, its value and the limit.
    """
    _check_value("", config)


def _check_value(name: str, value: Any) -> None:
    if isinstance(value, Mapping | list) and len(value) > _LONGEST:
        raise CheckpointError(f"{name or 'it'} has {len(value):,} entries; at most {_LONGEST:,} are allowed.")
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _check_value(str(key), inner)
    elif isinstance(value, list):
        for inner in value:
            _check_value(name, inner)
    elif isinstance(value, int | float):
        most = _MOST.get(name, _LARGEST if isinstance(value, int) else None)
        if most is not None and not -most <= value <= most:
            raise CheckpointError(f"{name}={_short(value)} is above the limit of {most:,}; correct the file.")


def checked_ids(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Checks the ids of special tokens in a config, and replaces −1, which some files use for "none", by None.

    Args:
      config: the content of a config.json or generation_config.json.
      where: the file, for error messages.

    Returns:
      The corrected config.

    Raises:
      CheckpointError: an id is not a whole number of 0 or more (for `eos_token_id`: or a list of these).
    """
    checked = dict(config)
    for name in _IDS:
        value = checked.get(name)
        found = value if name in _ID_LISTS and isinstance(value, list) else [value]
        wrong = [index for index in found if not (index is None and value is None) and not _is_id(index)]
        if wrong and not (_is_whole(value) and value == _ABSENT):
            raise CheckpointError(
                f"{where}: {name}={_short(value)}; the id of a token must be a whole number from 0 to {MOST_IDS - 1:,}."
            )
        if wrong:
            checked[name] = None
    return checked


def _is_id(value: Any) -> bool:
    return _is_whole(value) and 0 <= value < MOST_IDS


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
