"""Which rows a phase has and which of them are held out: by prompt, so that no two sets have a prompt in common."""

import collections
import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from jax_rlhf.data.config import DataConfig
from jax_rlhf.data.formats import PHASES, own_prompt, row_texts
from jax_rlhf.data.sources import Row, is_reader
from jax_rlhf.data.tokens import openings

Group = str | bytes
"""What rows of one prompt have in common: the prompt, or the bytes of its first tokens."""


ONE_IN = 10
"""Of so many rows, and of so many prompts, of a file at most one is drawn to be held out."""
_BYTES = 6
"""Of a draw, for a number: a float holds 53 bits."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Rows of one path, each with its prompt.

    Attributes:
      path: where they are from.
      rows: the rows.
      prompts: the prompt of each, or its text if it has none.
      groups: of each; rows of one group stay together.
    """

    path: str
    rows: Sequence[Row]
    prompts: Sequence[str]
    groups: Sequence[Group]

    def where(self, wanted: Iterable[bool]) -> "Source":
        """Some of the rows.

        Args:
          wanted: whether, for each row.

        Returns:
          Those rows, in the same order.
        """
        kept = [index for index, want in enumerate(wanted) if want]
        rows, prompts = [self.rows[index] for index in kept], [self.prompts[index] for index in kept]
        return Source(self.path, rows, prompts, [self.groups[index] for index in kept])


def grouped(path: str, rows: Sequence[Row], config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Source:
    """Finds each row's prompt, the same in all phases.

    Args:
      path: where the rows are from.
      rows: as read.
      config: names of columns. With `prompt_tokens` rows of which PPO would see the same opening are one group.
      tokenizer: of the policy.

    Returns:
      The rows with prompts and groups.

    Raises:
      DataError: a row is broken.
    """
    found = [own_prompt(row, config) for row in rows]
    groups: list[Group] = [text for text, _ in found]
    if config.prompt_tokens is not None:
        opened = [index for index, (_, kind) in enumerate(found) if kind in ("prompt", "text")]
        texts = [row_texts(rows[index], "ppo", config, tokenizer) for index in opened]
        tokens = openings(texts, tokenizer, config.prompt_tokens)
        for index, text, opening in zip(opened, texts, tokens, strict=True):
            if text.prompt.strip():
                groups[index] = opening.tobytes()
    return Source(path, rows, [text for text, _ in found], groups)


def share(sources: Sequence[Source], split: tuple[float, float, float], phase: str, seed: int) -> list[Source]:
    """The phase's rows of each path: whole groups, so that their numbers come close to the split.

    All files are divided together, in the order of `sources`: a prompt that stands in two files is given once. Other
    phases may read other rows from a reader, so that its prompts, unless files have them, go by their hash alone.

    Args:
      sources: all rows.
      split: shares of SFT, reward and PPO, which add up to 1.
      phase: whose rows.
      seed: of the draw.

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
        # Large groups first: small ones can still even out what those leave.
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
    """Groups to hold out of files, the same in each phase that has the same rows of them.

    Of each file, they have at most `eval_rows` rows, a tenth of the rows and a tenth of the groups.

    Args:
      sources: the phase's rows; those of readers, which hold out their own, do not count.
      eval_rows: at most so many rows per file.
      seed: of the draw.

    Returns:
      The groups.
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
    """Random bytes of the seed and the group alone, so that all phases draw the same."""
    content = group if isinstance(group, bytes) else group.encode(errors="surrogatepass")
    return hashlib.blake2b(f"{seed}:".encode() + content, digest_size=16).digest()
