"""Checksums of rows, and of all that a phase reads of its data."""

import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import hashlib
import json
import pathlib
import re
import uuid
from collections.abc import Iterable, Mapping
from typing import Any, cast

import numpy as np

from jax_rlhf.data.tokens import Example

_ADDRESS = re.compile(r"\bat 0x[0-9a-f]+")
_SAID = (
    datetime.date,
    datetime.time,
    datetime.timedelta,
    decimal.Decimal,
    fractions.Fraction,
    uuid.UUID,
    pathlib.PurePath,
    complex,
)


def row_digest(content: Any) -> bytes:
    """A checksum of a row as it was read.

    Args:
      content: column → value.

    Returns:
      16 bytes.
    """
    return hashlib.blake2b(_in_json(content).encode(), digest_size=16).digest()


def examples_digest(examples: Iterable[Example], phase: str) -> str:
    """A checksum of what a phase reads: tokens, margins of pairs, and what reward functions get beside PPO's prompts.

    Args:
      examples: in order.
      phase: "sft", "reward" or "ppo".

    Returns:
      32 hexadecimal digits.
    """
    whole = hashlib.blake2b(digest_size=16)
    for example in examples:
        read = [part.tobytes().hex() for part in (example.prompt, *example.completions)]
        more: dict[str, list[Any]] = {
            "sft": [],
            "reward": [example.margin],
            "ppo": [dict(example.columns), example.chat, example.continued],
        }
        whole.update(_in_json([read, *more[phase]]).encode() + b"\n")
    return whole.hexdigest()


def _in_json(content: Any) -> str:
    try:
        return json.dumps(content, sort_keys=True, default=_said)
    except TypeError:  # keys that cannot be sorted, or that JSON does not know
        return json.dumps(_without_keys(content), default=lambda value: _without_keys(_said(value)))


def _without_keys(value: Any) -> Any:
    if isinstance(value, Mapping):
        pairs = [[_in_json(key), _without_keys(inner)] for key, inner in value.items()]
        return [{"mapping": sorted(pairs, key=lambda pair: pair[0])}]
    return [_without_keys(inner) for inner in value] if isinstance(value, list | tuple) else value


def _said(value: Any) -> Any:
    """What JSON can hold of a value, the same in each process: an object's address is none of it.

    Of objects whose repr names an address, such as those of the user's own reader, their class alone.
    """
    if isinstance(value, bytes | bytearray):
        return value.hex()
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set | frozenset):
        return sorted(map(_in_json, value))
    if isinstance(value, collections.deque | range):
        return list(value)
    if isinstance(value, enum.Enum):
        return [type(value).__qualname__, value.name]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return [type(value).__qualname__, fields]
    if isinstance(value, _SAID):
        return str(value)
    if callable(content := getattr(value, "tobytes", None)):  # images, arrays of Python's own
        return [type(value).__qualname__, str(getattr(value, "size", "")), cast(bytes, content()).hex()]
    said = repr(value)
    return type(value).__qualname__ if _ADDRESS.search(said) else said
