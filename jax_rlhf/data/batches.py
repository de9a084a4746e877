"""From examples to batches: padded to one of a few widths, each process with its own rows."""

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
"""Row ids of held-out prompts count from here, so that they share no randomness with those of training."""


class TextBatch(struct.PyTreeNode):
    """Rows for the SFT phase, padded on the right.

    Attributes:
      tokens: int32[B, T].
      mask: bool[B, T], True = real token.
      completion_mask: bool[B, T], True = token of a completion.
      segments: int32[B, T], which of the texts packed into a row a token is of, from 0.
      positions: int32[B, T], tokens of the same text before it.
    """

    tokens: AnyArray
    mask: AnyArray
    completion_mask: AnyArray
    segments: AnyArray
    positions: AnyArray


class PairBatch(struct.PyTreeNode):
    """Pairs for the reward phase, prompt + answer, padded on the right.

    Attributes:
      chosen, rejected: int32[B, T].
      chosen_mask, rejected_mask: bool[B, T], True = real token; a row without one is no pair.
      margin: float32[B], in reward units.
    """

    chosen: AnyArray
    rejected: AnyArray
    chosen_mask: AnyArray
    rejected_mask: AnyArray
    margin: AnyArray


class PackedPairs(struct.PyTreeNode):
    """Pairs for the reward phase, several to a row: prompt + chosen, prompt + rejected, prompt + chosen, …

    Attributes:
      tokens: int32[B, T].
      mask: bool[B, T], True = real token.
      segments: int32[B, T], which of the row's texts a token is of, from 0.
      positions: int32[B, T], tokens of the same text before it.
      chosen_last, rejected_last: int32[B, S], where in the row the answers of each pair end.
      real: bool[B, S], True = there is such a pair.
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


def real_tokens(batch: TextBatch | PairBatch | PackedPairs) -> Array:
    """How many tokens a batch has, pads left out.

    Args:
      batch: of either phase.

    Returns:
      int32[].
    """
    masks = (batch.chosen_mask, batch.rejected_mask) if isinstance(batch, PairBatch) else (batch.mask,)
    return jnp.asarray(sum(jnp.sum(mask) for mask in masks))


def width(longest: int, buckets: Sequence[int]) -> int:
    """The smallest of a few widths that holds a row.

    Args:
      longest: in tokens.
      buckets: widths, ascending; the last holds everything.

    Returns:
      A bucket.
    """
    return buckets[bisect.bisect_left(buckets, longest)]


def text_batch(rows: Sequence[Sequence[Example]], columns: int, pad: int) -> TextBatch:
    """Rows of one text, or of several packed.

    Args:
      rows: B rows of texts; a row may be empty.
      columns: T.
      pad: id at pads.

    Returns:
      The batch, in NumPy arrays.
    """
    shape = (len(rows), columns)
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
    """Pairs of answers.

    Args:
      rows: B pairs; None = a row that is no pair.
      columns: T.
      pad: id at pads.

    Returns:
      The batch, in NumPy arrays.
    """
    tokens = [np.full((len(rows), columns), pad, np.int32) for _ in range(2)]
    masks = [np.zeros((len(rows), columns), bool) for _ in range(2)]
    margin = np.zeros(len(rows), np.float32)
    for r, example in enumerate(rows):
        if example is None:
            continue
        for answer in range(2):
            ids = np.concatenate([example.prompt, example.completions[answer]])
            tokens[answer][r, : len(ids)], masks[answer][r, : len(ids)] = ids, True
        margin[r] = example.margin
    return PairBatch(tokens[0], tokens[1], masks[0], masks[1], margin)


def packed_pairs(rows: Sequence[Sequence[Example]], columns: int, slots: int, pad: int) -> PackedPairs:
    """Rows of several pairs.

    Args:
      rows: B rows of pairs; a row may be empty.
      columns: T.
      slots: S, the most pairs that a row may have.
      pad: id at pads.

    Returns:
      The batch, in NumPy arrays.
    """
    texts = [[dataclasses.replace(pair, completions=(c,)) for pair in row for c in pair.completions] for row in rows]
    laid_out = text_batch(texts, columns, pad)
    last = np.zeros((len(rows), slots, 2), np.int32)
    real, margin = np.zeros((len(rows), slots), bool), np.zeros((len(rows), slots), np.float32)
    for r, row in enumerate(rows):
        ends = np.cumsum([text.length for text in texts[r]], dtype=np.int32) - 1
        last[r, : len(row)], real[r, : len(row)] = ends.reshape(-1, 2), True
        margin[r, : len(row)] = [pair.margin for pair in row]
    apart = laid_out.segments, laid_out.positions
    return PackedPairs(laid_out.tokens, laid_out.mask, *apart, last[..., 0], last[..., 1], real, margin)


def prompt_batch(
    rows: Sequence[Example], columns: int, pad: int, row_ids: np.ndarray, names: Sequence[str] = ()
) -> Prompts:
    """Prompts, padded on the left.

    Args:
      rows: B prompts.
      columns: P.
      pad: id at pads.
      row_ids: int[B], what addresses their randomness.
      names: of the data's columns.

    Returns:
      The batch; the data's columns come along, None where a row has not got one, and so do the messages of chats.
    """
    tokens, mask = np.full((len(rows), columns), pad, np.int32), np.zeros((len(rows), columns), bool)
    for r, example in enumerate(rows):
        tokens[r, columns - len(example.prompt) :], mask[r, columns - len(example.prompt) :] = example.prompt, True
    others = {name: [example.columns.get(name) for example in rows] for name in names}
    chats = [example.chat for example in rows]
    continued = [example.continued for example in rows]
    more = (chats, continued) if any(chats) else (None, None)
    return Prompts(tokens, mask, np.asarray(row_ids, np.int32), others, *more)


def packed(examples: Sequence[Example], columns: int) -> list[list[Example]]:
    """Texts, or pairs of them, that share rows: best fit, the longest first, so that few rows are needed.

    Args:
      examples: the texts, none longer than a row.
      columns: of a row, in tokens.

    Returns:
      The rows.
    """
    rows: list[list[Example]] = []
    spaces: list[tuple[int, int]] = []  # (what is left of a row, the row), ascending
    for example in sorted(examples, key=lambda example: -example.total_length):
        place = bisect.bisect_left(spaces, (example.total_length, -1))
        if place == len(spaces):
            rows.append([])
            space, row = columns, len(rows) - 1
        else:
            space, row = spaces.pop(place)
        rows[row].append(example)
        bisect.insort(spaces, (space - example.total_length, row))
    return rows
