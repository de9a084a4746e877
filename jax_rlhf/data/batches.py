"""Makes batches of examples, padded to one of a few widths; each process makes its local rows only.

Shapes: B = rows, T = tokens per row, P = tokens per prompt, S = pairs per packed row.
"""

import bisect
import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from jax_rlhf.data.tokens import Example
from jax_rlhf.rl import Prompts
from jax_rlhf.rl.types import AnyArray

FIRST_EVAL_ROW = 1 << 24
"""Row ids of held-out prompts start here, so that they share no random numbers with training prompts."""


class TextBatch(struct.PyTreeNode):
    """Rows for the SFT phase, padded on the right.

    Attributes:
      tokens: int32[B, T].
      mask: bool[B, T], True = real token.
      completion_mask: bool[B, T], True = token of a completion.
      segments: int32[B, T], index in the row of the packed text to which a token belongs.
      positions: int32[B, T], position of a token in its text.
    """

    tokens: AnyArray
    mask: AnyArray
    completion_mask: AnyArray
    segments: AnyArray
    positions: AnyArray

    def real_tokens(self) -> Array:
        """The number of tokens without pads, int32[]."""
        return jnp.sum(self.mask)


class PairBatch(struct.PyTreeNode):
    """Pairs for the reward phase, prompt + answer, padded on the right.

    Attributes:
      chosen, rejected: int32[B, T].
      chosen_mask, rejected_mask: bool[B, T], True = real token; a row without real tokens only fills the batch up.
      margin: float32[B], in reward units.
    """

    chosen: AnyArray
    rejected: AnyArray
    chosen_mask: AnyArray
    rejected_mask: AnyArray
    margin: AnyArray

    def real_tokens(self) -> Array:
        """The number of tokens without pads, int32[]."""
        return jnp.sum(self.chosen_mask) + jnp.sum(self.rejected_mask)


class PackedPairs(struct.PyTreeNode):
    """Pairs for the reward phase, several per row: prompt + chosen, prompt + rejected, prompt + chosen, …

    Attributes:
      tokens: int32[B, T].
      mask: bool[B, T], True = real token.
      segments: int32[B, T], index in the row of the text to which a token belongs.
      positions: int32[B, T], position of a token in its text.
      chosen_last, rejected_last: int32[B, S], index of the last token of each pair's answers.
      real: bool[B, S], True = the row has this pair, False = an unused slot.
      margin: float32[B, S], in reward units.
    """

    tokens: AnyArray
    mask: AnyArray
    segments: AnyArray
    positions: AnyArray
    chosen_last: AnyArray
    rejected_last: AnyArray
    real: AnyArray
    margin: AnyArray

    def real_tokens(self) -> Array:
        """The number of tokens without pads, int32[]."""
        return jnp.sum(self.mask)


def width(longest: int, buckets: Sequence[int]) -> int:
    """The smallest bucket into which the longest row fits.

    Args:
      longest: its length in tokens.
      buckets: widths in tokens, ascending; every row fits into the last.
    """
    return buckets[bisect.bisect_left(buckets, longest)]


def text_batch(rows: Sequence[Sequence[Example]], columns: int, pad: int) -> TextBatch:
    """A batch of rows with one text, or with several packed texts.

    Args:
      rows: B rows of texts; a row may be empty.
      columns: T.
      pad: the pad token's id.

    Returns:
      The batch, in NumPy arrays.
    """
    shape = (len(rows), columns)  # [B, T]
    tokens = np.full(shape, pad, np.int32)
    mask, completion = np.zeros(shape, bool), np.zeros(shape, bool)
    segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for r, row in enumerate(rows):
        begin = 0
        for segment, example in enumerate(row):
            end = begin + example.length
            tokens[r, begin:end] = np.concatenate([example.prompt, example.completions[0]])
            mask[r, begin:end] = True
            completion[r, begin + len(example.prompt) : end] = True
            segments[r, begin:end], positions[r, begin:end] = segment, np.arange(end - begin)
            begin = end
    return TextBatch(tokens, mask, completion, segments, positions)


def pair_batch(rows: Sequence[Example | None], columns: int, pad: int) -> PairBatch:
    """A batch with one pair of answers per row.

    Args:
      rows: B pairs; None = an empty row that fills the batch up.
      columns: T.
      pad: the pad token's id.

    Returns:
      The batch, in NumPy arrays.
    """
    tokens = [np.full((len(rows), columns), pad, np.int32) for _ in range(2)]  # chosen, rejected: [B, T] each
    masks = [np.zeros((len(rows), columns), bool) for _ in range(2)]  # [B, T] each
    margin = np.zeros(len(rows), np.float32)  # [B]
    for r, example in enumerate(rows):
        if example is None:
            continue
        for answer in range(2):
            ids = np.concatenate([example.prompt, example.completions[answer]])
            tokens[answer][r, : len(ids)], masks[answer][r, : len(ids)] = ids, True
        margin[r] = example.margin
    return PairBatch(tokens[0], tokens[1], masks[0], masks[1], margin)


def packed_pairs(rows: Sequence[Sequence[Example]], columns: int, slots: int, pad: int) -> PackedPairs:
    """A batch with several pairs per row.

    Args:
      rows: B rows of pairs; a row may be empty.
      columns: T.
      slots: S, the largest number of pairs per row.
      pad: the pad token's id.

    Returns:
      The batch, in NumPy arrays.
    """
    texts = [[dataclasses.replace(pair, completions=(c,)) for pair in row for c in pair.completions] for row in rows]
    batch = text_batch(texts, columns, pad)
    last = np.zeros((len(rows), slots, 2), np.int32)  # [B, S, (chosen, rejected)]
    real, margin = np.zeros((len(rows), slots), bool), np.zeros((len(rows), slots), np.float32)  # [B, S]
    for r, row in enumerate(rows):
        ends = np.cumsum([text.length for text in texts[r]], dtype=np.int32) - 1
        last[r, : len(row)], real[r, : len(row)] = ends.reshape(-1, 2), True
        margin[r, : len(row)] = [pair.margin for pair in row]
    separation = batch.segments, batch.positions
    return PackedPairs(batch.tokens, batch.mask, *separation, last[..., 0], last[..., 1], real, margin)


def prompt_batch(
    rows: Sequence[Example], columns: int, pad: int, row_ids: np.ndarray, names: Sequence[str] = ()
) -> Prompts:
    """A batch of prompts, padded on the left.

    Args:
      rows: B prompts.
      columns: P.
      pad: the pad token's id.
      row_ids: int[B]; each row's random numbers are derived from its id.
      names: columns of the data that the batch keeps, for reward functions.

    Returns:
      The batch, with the columns (None where a row lacks one) and the messages of chats.
    """
    tokens, mask = np.full((len(rows), columns), pad, np.int32), np.zeros((len(rows), columns), bool)  # [B, P]
    for r, example in enumerate(rows):
        tokens[r, columns - len(example.prompt) :], mask[r, columns - len(example.prompt) :] = example.prompt, True
    data_columns = {name: [example.columns.get(name) for example in rows] for name in names}
    chats = [example.chat for example in rows]
    continued = [example.continued for example in rows]
    chat_fields = (chats, continued) if any(chats) else (None, None)
    return Prompts(tokens, mask, np.asarray(row_ids, np.int32), data_columns, *chat_fields)


def packed(examples: Sequence[Example], columns: int) -> list[list[Example]]:
    """Packs texts, or pairs of texts, into few rows: best fit, longest first.

    Args:
      examples: the texts, none longer than a row.
      columns: tokens per row.

    Returns:
      The texts of each row.
    """
    rows: list[list[Example]] = []
    spaces: list[tuple[int, int]] = []  # (free tokens of a row, index of the row), ascending
    for example in sorted(examples, key=lambda example: -example.total_length):
        index = bisect.bisect_left(spaces, (example.total_length, -1))
        if index == len(spaces):
            rows.append([])
            space, row = columns, len(rows) - 1
        else:
            space, row = spaces.pop(index)
        rows[row].append(example)
        bisect.insort(spaces, (space - example.total_length, row))
    return rows
