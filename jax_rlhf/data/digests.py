"""Checksums of rows, and of all that a phase reads."""

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
_TYPES_AS_STR = (
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
    """The 16-byte checksum of a row (column → value)."""
    return hashlib.blake2b(_in_json(content).encode(), digest_size=16).digest()


def examples_digest(examples: Iterable[Example], phase: str) -> str:
    """The checksum of what a phase reads: tokens, margins of pairs, and columns and chats for PPO's reward functions.

    Args:
      examples: in order.
      phase: "sft", "reward" or "ppo".

    Returns:
      32 hexadecimal digits.
    """
    whole = hashlib.blake2b(digest_size=16)
    for example in examples:
        read = [part.tobytes().hex() for part in (example.prompt, *example.completions)]
        extras: dict[str, list[Any]] = {
            "sft": [],
            "reward": [example.margin],
            "ppo": [dict(example.columns), example.chat, example.continued],
        }
        whole.update(_in_json([read, *extras[phase]]).encode() + b"\n")
    return whole.hexdigest()


def _in_json(content: Any) -> str:
    try:
        return json.dumps(content, sort_keys=True, default=_json_value)
    except TypeError:  # keys that cannot be sorted, or that JSON does not allow
        return json.dumps(_without_keys(content), default=lambda value: _without_keys(_json_value(value)))


def _without_keys(value: Any) -> Any:
    """Replaces each mapping by a sorted list of (key, value)."""
    if isinstance(value, Mapping):
        pairs = [[_in_json(key), _without_keys(inner)] for key, inner in value.items()]
        return [{"mapping": sorted(pairs, key=lambda pair: pair[0])}]
    return [_without_keys(inner) for inner in value] if isinstance(value, list | tuple) else value


def _json_value(value: Any) -> Any:
    """A JSON-compatible form of a value that is the same in each process, so that it must not contain an address.

    An object with an address in its repr, such as one of the user's own reader, is represented by its class name only.
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
    if isinstance(value, _TYPES_AS_STR):
        return str(value)
    if callable(content := getattr(value, "tobytes", None)):  # images, Python's array.array
        return [type(value).__qualname__, str(getattr(value, "size", "")), cast(bytes, content()).hex()]
    text = repr(value)
    return type(value).__qualname__ if _ADDRESS.search(text) else text
