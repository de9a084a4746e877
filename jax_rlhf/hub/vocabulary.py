"""Limits the length of the tokens of a vocabulary from which merges are derived.

If a file has no merges, they are found by trying every way to split each token in two. For a token of a million
characters these are a million splits, with pieces of half a million characters on average.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from jax_rlhf.hub.checkpoint_error import CheckpointError
from jax_rlhf.io.json_files import JSONFileError, read_object

_LONGEST = 1024
"""The largest number of characters per token; sentencepiece's own limit is 512."""
_ALL = 20_000_000
"""The largest number of characters of all tokens; the largest real vocabularies have two million."""
_MOST_BYTES = 64 * 2**20
_BYTES_PER_CHARACTER = 4
_SENTENCEPIECE = ("tokenizer.model", "spiece.model")


def check_tokens(tokens: Iterable[str], where: str) -> None:
    """Checks that merges of the tokens can be found in a reasonable time.

    Args:
      tokens: all tokens.
      where: the file, for error messages.

    Raises:
      CheckpointError: a token is too long, or all tokens together are.
    """
    total = 0
    for token in tokens:
        total += len(token)
        if len(token) > _LONGEST:
            raise CheckpointError(
                f"{where}: the token {token[:40]!r}… has {len(token):,} characters; at most {_LONGEST:,} are allowed "
                "in a file without merges."
            )
    if total > _ALL:
        raise CheckpointError(f"{where}: its tokens have {total:,} characters; at most {_ALL:,} are allowed.")


def check_files(folder: Path) -> None:
    """Checks the vocabulary of a checkpoint folder without tokenizer.json, which transformers would derive from it.

    Raises:
      CheckpointError: as for `check_tokens`, or a file is not a vocabulary.
    """
    if (folder / "tokenizer.json").is_file():
        return
    vocabulary = folder / "vocab.json"
    if vocabulary.is_file():
        try:
            check_tokens(read_object(vocabulary, most_bytes=_MOST_BYTES), str(vocabulary))
        except JSONFileError as error:
            raise CheckpointError(f"{vocabulary}: {error}; copy or download it again.") from error
    for file in (folder / name for name in _SENTENCEPIECE if (folder / name).is_file()):
        if os.stat(file).st_size > _MOST_BYTES:
            raise CheckpointError(f"{file}: it has more than {_MOST_BYTES:,} bytes.")
        try:
            sizes = _piece_sizes(file.read_bytes())
        except IndexError as error:
            raise CheckpointError(f"{file}: not a whole sentencepiece model; copy or download it again.") from error
        if max(sizes, default=0) > _LONGEST * _BYTES_PER_CHARACTER or sum(sizes) > _ALL * _BYTES_PER_CHARACTER:
            raise CheckpointError(f"{file}: a token is too long; at most {_LONGEST:,} characters are allowed.")


def _piece_sizes(content: bytes) -> list[int]:
    """Bytes of each of ModelProto.pieces, field 1 of sentencepiece_model.proto; IndexError at the end of the file."""
    sizes, offset = [], 0
    while offset < len(content):
        tag, offset = _varint(content, offset)
        field, kind = tag >> 3, tag & 7
        if kind == 0:
            _, offset = _varint(content, offset)
        elif kind in (1, 5):
            offset += 8 if kind == 1 else 4
        elif kind == 2:
            size, offset = _varint(content, offset)
            offset += size
            if field == 1:
                sizes.append(size)
        else:
            raise IndexError(offset)
    if offset > len(content):
        raise IndexError(offset)
    return sizes


def _varint(content: bytes, offset: int) -> tuple[int, int]:
    """(value of the variable-length integer at an offset, offset behind it)."""
    value = shift = 0
    while content[offset] & 0x80:
        value |= (content[offset] & 0x7F) << shift
        offset, shift = offset + 1, shift + 7
        if shift > 63:
            raise IndexError(offset)
    return value | content[offset] << shift, offset + 1
