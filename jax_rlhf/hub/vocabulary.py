"""How long the tokens of a vocabulary are, before merges are made of it.

Where a file names no merges they are found by looking at every way to cut each token in two: of a token of a million
characters a million pieces of half a million.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from jax_rlhf.hub.checkpoint_error import CheckpointError
from jax_rlhf.io.json_files import JSONFileError, read_object

_LONGEST = 1024
"""Characters of a token; sentencepiece's own limit is 512."""
_ALL = 20_000_000
"""Characters of all tokens; the largest vocabularies have two million."""
_MOST_BYTES = 64 * 2**20
_BYTES_PER_CHARACTER = 4
_SENTENCEPIECE = ("tokenizer.model", "spiece.model")


def check_tokens(tokens: Iterable[str], where: str) -> None:
    """Raises where merges cannot be found in a reasonable time.

    Args:
      tokens: all tokens.
      where: the file, for messages.

    Raises:
      CheckpointError: a token is too long, or all together are.
    """
    total = 0
    for token in tokens:
        total += len(token)
        if len(token) > _LONGEST:
            raise CheckpointError(
                f"{where}: the token {token[:40]!r}… has {len(token):,} characters; tokens of up to {_LONGEST:,} are "
                "read where a file does not name its merges."
            )
    if total > _ALL:
        raise CheckpointError(f"{where}: its tokens have {total:,} characters; up to {_ALL:,} are read.")


def check_files(folder: Path) -> None:
    """The same for the files of a folder without tokenizer.json, of which transformers makes one.

    Args:
      folder: of a checkpoint.

    Raises:
      CheckpointError: as above, or a file is no vocabulary.
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
            raise CheckpointError(
                f"{file}: a token of it is too long; tokens of up to {_LONGEST:,} characters are read."
            )


def _piece_sizes(content: bytes) -> list[int]:
    """Bytes of each of ModelProto.pieces, field 1 of sentencepiece_model.proto; IndexError where the file ends."""
    sizes, place = [], 0
    while place < len(content):
        tag, place = _varint(content, place)
        field, kind = tag >> 3, tag & 7
        if kind == 0:
            _, place = _varint(content, place)
        elif kind in (1, 5):
            place += 8 if kind == 1 else 4
        elif kind == 2:
            size, place = _varint(content, place)
            place += size
            if field == 1:
                sizes.append(size)
        else:
            raise IndexError(place)
    if place > len(content):
        raise IndexError(place)
    return sizes


def _varint(content: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while content[place] & 0x80:
        value |= (content[place] & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if shift > 63:
            raise IndexError(place)
    return value | content[place] << shift, place + 1
