"""Settings of the data: what is read, and how it is split, tokenized and batched."""

import dataclasses
from typing import Literal

from jax_rlhf.settings import check_ranges

PHASES = ("sft", "reward", "ppo")
"""In the order in which they run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data of all phases; formats are TRL's, see `formats.py`."""

    paths: tuple[str, ...] = ()
    """Each is a .jsonl, .json, .csv or .tsv file (also with .gz), or a .parquet or .arrow file; a Hugging Face data set
    ("org/name" or "org/name:configuration"), or a folder that `datasets` can load or has saved; or a reader,
    "FILE.py:function" or "package.module:function": f(phase=…, split="train" | "eval") → rows as dicts."""
    ptx_paths: tuple[str, ...] = ()
    """Texts for the pretraining loss in PPO (`ppo.loss.ptx_coef`); empty = the texts of the SFT phase from `paths`."""
    weights: tuple[float, ...] = ()
    """The weight of each path in the mixture; empty = the number of its rows."""
    eval_paths: tuple[str, ...] = ()
    """Held-out rows; empty = the rows that a reader returns for "eval", and `eval_rows` rows of every other path. No
    held-out prompt is trained on, in any phase (docs/data.md says what a prompt is)."""
    split: str = "train"
    """The split of a Hugging Face data set, for `paths`."""
    eval_split: str = "test"
    """The same for `eval_paths`."""
    revision: str | None = None
    """The revision of a Hugging Face data set."""
    data_split: str = ""
    """Shares of each path for SFT, reward and PPO, such as "2,4,4". The seed assigns each prompt to one phase; "" =
    each phase gets all rows."""
    eval_rows: int = 256
    """The largest number of held-out rows per path and phase. From `paths` whole prompts are held out, at most a tenth
    of the rows and of the prompts in the phase's share."""

    prompt_column: str = "prompt"
    """The name of the column with prompts."""
    completion_column: str = "completion"
    """The column of completions."""
    chosen_column: str = "chosen"
    """The column of the preferred answers."""
    rejected_column: str = "rejected"
    """The column of the dispreferred answers."""
    text_column: str = "text"
    """The column of plain texts."""
    messages_column: str = "messages"
    """The column of chats."""
    margin_column: str = "margin"
    """The column of margins, by how much the chosen answer is better (in reward units)."""
    label_column: str = "label"
    """The column of labels; a completion with a false label is not learned."""
    tools_column: str = "tools"
    """The column of the tools that the assistant may call, for the chat template."""

    max_prompt_tokens: int = 256
    """The longest prompt of the PPO phase, in tokens."""
    max_tokens: int = 512
    """The longest prompt + completion of the SFT and reward phases, in tokens."""
    too_long: Literal["filter", "truncate"] = "filter"
    """Longer rows are left out and counted ("filter"), or cut ("truncate"): prompts on the left, completions on the
    right."""
    on_bad_row: Literal["error", "drop"] = "error"
    """A row with an empty completion, with equal chosen and rejected answers, or with an answer of which the chat
    template omits a part, raises an "error", or is left out and counted ("drop")."""
    as_chat: bool = False
    """Plain-text prompts and answers become messages of the user and the assistant, and are rendered with the
    tokenizer's chat template."""
    parse_special_tokens: bool = False
    """The text of a special token in a row, such as <|im_end|>, is tokenized as that token; set this for data that a
    chat template has already rendered. Otherwise it is tokenized as text, and cannot open or end a turn."""
    prompt_tokens: int | None = None
    """Prompts of the PPO phase are the first so many tokens of `text` (or of `prompt`); None = whole prompts. Shorter
    ones are left out and counted. In all phases, rows with the same first tokens have the same prompt."""
    deduplicate: bool = True
    """Of equal rows one is kept; rows of `paths` are not trained on if their prompt is in `eval_paths` or in a reader's
    "eval" rows."""
    pad_token: str | None = None
    """The pad token for a tokenizer that has none; any token will do, since masks are made from lengths."""

    sft_batch_size: int = 16
    """Rows per step (packed rows, with packing), over all devices."""
    reward_batch_size: int = 16
    """Pairs per step (packed rows, with packing), over all devices."""
    ppo_batch_size: int = 64
    """Prompts per iteration, over all devices."""
    packing: bool = False
    """Several SFT texts share a row of max_tokens, and several reward pairs a row of 2 · max_tokens; they do not attend
    to each other. The reward phase's token loss uses unpacked pairs regardless."""
    length_buckets: tuple[int, ...] = ()
    """Widths to which batches are padded, in tokens; empty = a quarter, a half and all of the longest allowed."""
    prefetch: int = 2
    """Batches that are made ahead of their use."""

    def __post_init__(self) -> None:
        names = ("max_prompt_tokens", "max_tokens", "prompt_tokens", "eval_rows", "prefetch")
        check_ranges(self, at_least_1=(*names, "sft_batch_size", "reward_batch_size", "ppo_batch_size"))
        if self.weights and len(self.weights) != len(self.paths):
            raise ValueError(f"there are {len(self.weights)} weights for {len(self.paths)} paths; set one per path.")
        if any(not weight > 0 for weight in self.weights):
            raise ValueError(f"weights={self.weights} must all be above 0; remove a path that should not be used.")
        shares(self.data_split)

    @property
    def prompt_width(self) -> int:
        """The largest number of tokens of a prompt of PPO."""
        return self.max_prompt_tokens if self.prompt_tokens is None else self.prompt_tokens


def shares(data_split: str) -> tuple[float, float, float] | None:
    """Parses `data_split`, such as "2,4,4".

    Args:
      data_split: three numbers, for SFT, reward and PPO; "" = no split.

    Returns:
      Shares that sum to 1, or None.

    Raises:
      ValueError: the text is not three numbers of 0 or more.
    """
    if not data_split.strip():
        return None
    try:
        numbers = [float(part) for part in data_split.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 3 or any(not 0 <= number < float("inf") for number in numbers) or sum(numbers) <= 0:
        raise ValueError(f'data_split={data_split!r} must be three numbers, for SFT, reward and PPO, such as "2,4,4".')
    sft, reward, ppo = (number / sum(numbers) for number in numbers)
    return sft, reward, ppo
