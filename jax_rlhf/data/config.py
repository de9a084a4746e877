"""Which data, and how it becomes batches."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data of all phases; formats are TRL's, see `formats.py`."""

    paths: tuple[str, ...] = ()
    """Each a .jsonl, .json, .parquet or .csv file; a Hugging Face data set, "org/name" or "org/name:configuration",
    or a folder that `datasets` loads or saved; or "package.module:function", a reader: f(phase=…, split="train" |
    "eval") → rows as dicts."""
    ptx_paths: tuple[str, ...] = ()
    """Texts of the pretraining loss in PPO (`ppo.loss.ptx_coef`); empty = what the SFT phase learns of `paths`."""
    weights: tuple[float, ...] = ()
    """The share of each path in the mixture; empty = by their sizes."""
    eval_paths: tuple[str, ...] = ()
    """Held-out rows; empty = what each reader returns for "eval", and `eval_rows` of each other path's. No prompt
    that is held out is trained on, in any phase (docs/data.md says what a prompt is)."""
    split: str = "train"
    """The split of a Hugging Face data set, for `paths`."""
    eval_split: str = "test"
    """The same for `eval_paths`."""
    revision: str | None = None
    """The revision of a Hugging Face data set."""
    data_split: str = ""
    """Shares of each path for the phases, such as "2,4,4", drawn by the seed: no prompt is in two; "" = each phase
    has all rows."""
    eval_rows: int = 256
    """Held-out rows per path and phase, at most; of `paths` whole prompts, and never more than a tenth of the rows
    and of the prompts in the phase's share."""

    prompt_column: str = "prompt"
    """The column of prompts, as it is called in the data."""
    completion_column: str = "completion"
    """The column of completions."""
    chosen_column: str = "chosen"
    """The column of the preferred answers."""
    rejected_column: str = "rejected"
    """The column of the other answers."""
    text_column: str = "text"
    """The column of plain texts."""
    messages_column: str = "messages"
    """The column of chats."""
    margin_column: str = "margin"
    """The column of how much better an answer is."""
    label_column: str = "label"
    """The column of labels; a completion whose label is false is not learned."""
    tools_column: str = "tools"
    """The column of what the assistant may call, for the chat template."""

    max_prompt_tokens: int = 256
    """Longest prompt of the PPO phase, in tokens."""
    max_tokens: int = 512
    """Longest prompt + completion of the SFT and reward phases, in tokens."""
    too_long: Literal["filter", "truncate"] = "filter"
    """What happens to longer rows: they are left out ("filter") and counted, or cut ("truncate"): prompts from the
    left, completions from the right."""
    on_bad_row: Literal["error", "drop"] = "error"
    """What happens at an empty completion, chosen = rejected, or an answer of which the chat template leaves out a
    part: stop with an "error", or "drop" and count."""
    as_chat: bool = False
    """Prompts and answers that are plain texts are written with the tokenizer's chat template, as what the user and
    the assistant say."""
    parse_special_tokens: bool = False
    """The text of a special token, such as <|im_end|>, is read as the token wherever a row has it, as data needs
    that was written with a chat template beforehand; else as text, which ends and opens no turn."""
    prompt_tokens: int | None = None
    """Prompts of the PPO phase are the first so many tokens of `text` (or of `prompt`); None = whole prompts.
    Shorter ones are left out and counted. In all phases rows with one opening have one prompt."""
    deduplicate: bool = True
    """Of rows that are alike, one stays; rows of `paths` that have a prompt of `eval_paths`' or of a reader's "eval"
    rows are not trained on."""
    pad_token: str | None = None
    """The pad token of a tokenizer that has none; any will do, since masks come from lengths."""

    sft_batch_size: int = 16
    """Rows per step (packs, with packing), of all devices together."""
    reward_batch_size: int = 16
    """Pairs per step (packs, with packing)."""
    ppo_batch_size: int = 64
    """Prompts per iteration, of all devices together."""
    packing: bool = False
    """SFT texts share a row of max_tokens, reward pairs one of 2 · max_tokens, without seeing each other; the reward
    phase's token loss takes its pairs one by one all the same."""
    length_buckets: tuple[int, ...] = ()
    """Widths that batches are padded to, in tokens; empty = quarter, half and whole of the longest allowed."""
    prefetch: int = 2
    """Batches made ahead of their use."""

    def __post_init__(self) -> None:
        names = ("max_prompt_tokens", "max_tokens", "prompt_tokens", "eval_rows", "prefetch")
        for name in (*names, "sft_batch_size", "reward_batch_size", "ppo_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be 1 or more.")
        if self.weights and len(self.weights) != len(self.paths):
            raise ValueError(f"{len(self.weights)} weights are given for {len(self.paths)} paths; one each is needed.")
        if any(not weight > 0 for weight in self.weights):
            raise ValueError(f"weights={self.weights} must all be above 0; leave a path out that is not wanted.")
        shares(self.data_split)


def shares(data_split: str) -> tuple[float, float, float] | None:
    """What "2,4,4" means.

    Args:
      data_split: three numbers, of SFT, reward and PPO; "" = no split.

    Returns:
      Shares that add up to 1, or None.

    Raises:
      ValueError: not three numbers of 0 or more.
    """
    if not data_split.strip():
        return None
    try:
        numbers = [float(part) for part in data_split.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 3 or any(not 0 <= number < float("inf") for number in numbers) or sum(numbers) <= 0:
        raise ValueError(f'data_split={data_split!r}; three numbers for SFT, reward and PPO are expected: "2,4,4".')
    sft, reward, ppo = (number / sum(numbers) for number in numbers)
    return sft, reward, ppo
