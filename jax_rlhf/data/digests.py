"""Checksums of rows, and of all that a phase reads of its data."""

import datetime
import decimal
import hashlib
import json
import pathlib
import uuid
from collections.abc import Iterable
from typing import Any

import numpy as np

from jax_rlhf.data.tokens import Example

_SAID = (datetime.date, datetime.time, datetime.timedelta, decimal.Decimal, uuid.UUID, pathlib.PurePath, complex)


def row_digest(content: Any) -> bytes:
    """A checksum of a row as it was read.

    Args:
      content: column → value.

    Returns:
      16 bytes.
    """
    return hashlib.blake2b(json.dumps(content, sort_keys=True, default=str).encode(), digest_size=16).digest()


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
        whole.update(json.dumps([read, *more[phase]], sort_keys=True, default=_said).encode() + b"\n")
    return whole.hexdigest()


def _said(value: Any) -> Any:
    """What JSON can hold of a value, the same in each process: an object's address is none of it."""
    if isinstance(value, bytes | bytearray):
        return value.hex()
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist() if value.dtype != object else [_said(inner) for inner in value.reshape(-1)]
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    return str(value) if isinstance(value, _SAID) else type(value).__qualname__
