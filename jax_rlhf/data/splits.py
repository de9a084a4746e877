"""Splits rows between phases, and into training and held-out rows; no two of these sets have a prompt in common."""

import collections
import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from jax_rlhf.data.config import PHASES, DataConfig
from jax_rlhf.data.formats import own_prompt, row_texts
from jax_rlhf.data.sources import Row, is_reader
from jax_rlhf.data.tokens import first_tokens

Group = str | bytes
"""The key of rows with the same prompt: the prompt, or the bytes of its first tokens."""


ONE_IN = 10
"""At most one in so many rows, and one in so many prompts, of a file is held out."""
_BYTES = 6
"""Bytes of a random draw that are converted to a number; a float has 53 bits."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Rows of one path, each with its prompt.

    Attributes:
      path: the path from which the rows were read.
      rows: the rows.
      prompts: the prompt of each row, or its text if it has none.
      groups: the group of each row; a group is never split.
    """

    path: str
    rows: Sequence[Row]
    prompts: Sequence[str]
    groups: Sequence[Group]

    def where(self, wanted: Iterable[bool]) -> "Source":
        """Selects rows; `wanted` has one value per row."""
        kept = [index for index, want in enumerate(wanted) if want]
        rows, prompts = [self.rows[index] for index in kept], [self.prompts[index] for index in kept]
        return Source(self.path, rows, prompts, [self.groups[index] for index in kept])


def grouped(path: str, rows: Sequence[Row], config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Source:
    """Finds the prompt and the group of each row; both are the same in all phases.

    Args:
      path: the path from which the rows were read.
      rows: the rows as they were read.
      config: names of columns. With `prompt_tokens`, rows with the same first tokens are one group.
      tokenizer: the policy's tokenizer.

    Raises:
      DataError: a row is invalid.
    """
    found = [own_prompt(row, config) for row in rows]
    groups: list[Group] = [text for text, _ in found]
    if config.prompt_tokens is not None:
        with_prompt = [index for index, (_, kind) in enumerate(found) if kind in ("prompt", "text")]
        texts = [row_texts(rows[index], "ppo", config, tokenizer) for index in with_prompt]
        tokens = first_tokens(texts, tokenizer, config.prompt_tokens)
        for index, text, first in zip(with_prompt, texts, tokens, strict=True):
            if text.prompt.strip():
                groups[index] = first.tobytes()
    return Source(path, rows, [text for text, _ in found], groups)


def share(sources: Sequence[Source], split: tuple[float, float, float], phase: str, seed: int) -> list[Source]:
    """Selects a phase's rows of each path: whole groups, so that the numbers of rows come close to the split.

    Files are split one after the other, in the order of `sources`; a prompt that occurs in two files goes to one phase.
    A reader may return other rows to other phases. Its prompts, unless a file has them too, are therefore assigned by
    their hash alone.

    Args:
      sources: all rows.
      split: shares of SFT, reward and PPO, which sum to 1.
      phase: "sft", "reward" or "ppo".
      seed: of the random assignment.

    Returns:
      The phase's rows, in the order in which they were read.
    """
    phase_of: dict[Group, int] = {}
    for source in sources:
        if is_reader(source.path):
            continue
        counts = collections.Counter(source.groups)
        ends = [round(sum(split[:n]) * len(source.rows)) for n in range(len(split) + 1)]
        missing = [end - start for start, end in itertools.pairwise(ends)]
        for group in counts.keys() & phase_of.keys():
            missing[phase_of[group]] -= counts[group]
        # Large groups first, so that small ones can even out the numbers at the end.
        for group in sorted(counts.keys() - phase_of.keys(), key=lambda group: (-counts[group], _draw(group, seed))):
            index = max(range(len(missing)), key=missing.__getitem__)
            phase_of[group] = index
            missing[index] -= counts[group]
    ends = [sum(split[: n + 1]) for n in range(len(split) - 1)]
    for source in sources:
        for group in set(source.groups) - phase_of.keys():
            number = int.from_bytes(_draw(group, seed)[:_BYTES]) / (1 << 8 * _BYTES)  # from 0 on, below 1
            phase_of[group] = sum(number >= end for end in ends)
    wanted = PHASES.index(phase)
    return [source.where(phase_of[group] == wanted for group in source.groups) for source in sources]


def drawn(sources: Sequence[Source], eval_rows: int, seed: int) -> set[Group]:
    """Draws the groups of files to hold out. Phases with the same rows of the files get the same groups.

    Per file, the groups have at most `eval_rows` rows, a tenth of the rows and a tenth of the groups.

    Args:
      sources: the phase's rows; readers are ignored, because they return held-out rows themselves.
      eval_rows: the largest number of held-out rows per file.
      seed: of the draw.
    """
    counts = [collections.Counter(source.groups) for source in sources if not is_reader(source.path)]
    rows_left = [min(eval_rows, count.total() // ONE_IN) for count in counts]
    groups_left = [len(count) // ONE_IN for count in counts]
    held_out = set()
    for group in sorted(set().union(*counts), key=lambda group: _draw(group, seed)):
        files = [index for index, count in enumerate(counts) if group in count]
        if all(counts[index][group] <= rows_left[index] and groups_left[index] for index in files):
            held_out.add(group)
            for index in files:
                rows_left[index] -= counts[index][group]
                groups_left[index] -= 1
        if not any(rows_left):
            break
    return held_out


def _draw(group: Group, seed: int) -> bytes:
    """Random bytes that depend on the seed and the group only, so that all phases draw the same."""
    content = group if isinstance(group, bytes) else group.encode(errors="surrogatepass")
    return hashlib.blake2b(f"{seed}:".encode() + content, digest_size=16).digest()
