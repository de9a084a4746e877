"""`create_datasets`: from paths to batches that are a pure function of (seed, step)."""

import collections
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import grain
import jax
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from jax_rlhf.data.batches import FIRST_EVAL_ROW, packed, packed_pairs, pair_batch, prompt_batch, text_batch, width
from jax_rlhf.data.config import DataConfig, shares
from jax_rlhf.data.errors import DataError
from jax_rlhf.data.formats import PHASES, row_texts
from jax_rlhf.data.sources import Row, is_reader, read_rows
from jax_rlhf.data.tokens import Example, pad_id, tokenized
from jax_rlhf.hub import end_ids
from jax_rlhf.parallel import Layout, held_rows
from jax_rlhf.settings import from_mapping

Phase = Literal["sft", "reward", "ppo"]


@dataclasses.dataclass(frozen=True)
class Datasets:
    """A phase's data.

    Attributes:
      train: `train[step]` is the batch of a step, the same for ever; there is no last one.
      eval: `eval[i]`, held-out batches of the same number of rows; the last is filled up.
      train_rows: rows (or packs) that an epoch has.
      eval_rows: rows held out; what fills the last batch up does not count.
      batch_size: rows a batch, of all processes together.
      report: how many rows were read, and what became of them.
      digest: of all tokens, in order: processes that read other files differ in it.
      prefetch: batches made ahead of their use.
    """

    train: grain.MapDataset
    eval: Sequence[Any]
    train_rows: int
    eval_rows: int
    batch_size: int
    report: str
    digest: str
    prefetch: int = 2

    @property
    def steps_per_epoch(self) -> int:
        """Batches in which each row comes once, but for the last few."""
        return max(1, self.train_rows // self.batch_size)

    def batches(self, start: int, stop: int) -> Iterator[Any]:
        """The batches of steps `start` to `stop` − 1, made ahead in the background."""
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=self.prefetch)
        return iter(self.train[start:stop].to_iter_dataset(options))


def create_datasets(
    config: Any,
    tokenizer: PreTrainedTokenizerBase,
    phase: Phase,
    *,
    seed: int,
    eos_ids: Sequence[int] | None = None,
    mesh: Mesh | Layout | None = None,
) -> Datasets:
    """Reads, splits, filters, tokenizes and batches the data of one phase.

    Args:
      config: a `DataConfig`, or a mapping of its fields.
      tokenizer: the model's.
      phase: "sft" (batches are `TextBatch`), "reward" (`PairBatch`; packed `PackedPairs`) or "ppo" (`Prompts`).
      seed: of the split and of the order.
      eos_ids: tokens that end an answer; None = the tokenizer's EOS.
      mesh: where batches go. A process lays out the rows that its devices hold; it reads all, since the split, the
        order and the widths are those of the whole.

    Returns:
      The data sets; batches hold this process's rows of the global batch.

    Raises:
      DataError: a row is broken, columns are missing, nothing is left; says which and why.
      FileNotFoundError: a path does not exist.
      ValueError: a wrong setting.
    """
    config = from_mapping(DataConfig, config, "config.data")
    if phase not in PHASES:
        raise ValueError(f"phase={phase!r}; {', '.join(PHASES)} are the phases there are.")
    if not config.paths:
        raise DataError("config.data.paths is empty; it names the data: --config.data.paths=preferences.jsonl")
    pad, eos_ids = pad_id(tokenizer, config), end_ids(tokenizer) if eos_ids is None else eos_ids
    dropped: collections.Counter = collections.Counter()
    read, train, held_out = 0, [], []
    for path in config.paths:
        rows = read_rows(path, phase=phase, split="train", hub_split=config.split, revision=config.revision)
        read += len(rows)
        rows = _share(_distinct(rows, config, dropped), phase, config, seed, dropped)
        examples = _shuffled(_examples(rows, phase, tokenizer, config, dropped, eos_ids), seed)
        count = 0 if config.eval_paths or is_reader(path) else min(config.eval_rows, len(examples) // 10)
        train.append(examples[count:])
        held_out += examples[:count]
    for path in config.eval_paths or filter(is_reader, config.paths):
        rows = read_rows(path, phase=phase, split="eval", hub_split=config.eval_split, revision=config.revision)
        read += len(rows)
        examples = _shuffled(_examples(rows, phase, tokenizer, config, dropped, eos_ids), seed)
        dropped[f"more to hold out than eval_rows={config.eval_rows}"] += max(0, len(examples) - config.eval_rows)
        held_out += examples[: config.eval_rows]
    if config.deduplicate:
        train = [_without(held_out, examples, dropped) for examples in train]
    for path, examples in zip(config.paths, train, strict=True):
        if not examples:
            raise DataError(f"{path}: no row is left for the {phase} phase. {_report(read, 0, len(held_out), dropped)}")
    report = f"{phase} data: " + _report(read, sum(map(len, train)), len(held_out), dropped)
    mine = _my_rows(getattr(config, f"{phase}_batch_size"), mesh)
    return _batched(train, held_out, config, phase, pad, seed, report, mine)


def _report(read: int, used: int, held_out: int, dropped: collections.Counter) -> str:
    parts = [f"{read:,} rows read, {used:,} to train on, {held_out:,} held out"]
    return (
        "; ".join(parts + [f"left out: {count:,} ({reason})" for reason, count in dropped.most_common() if count]) + "."
    )


def _digest(content: Any) -> bytes:
    return hashlib.blake2b(json.dumps(content, sort_keys=True, default=str).encode(), digest_size=16).digest()


def _distinct(rows: list[Row], config: DataConfig, dropped: collections.Counter) -> list[Row]:
    """Rows of which no two are alike: before the split, so that the phases' shares are disjoint."""
    if not config.deduplicate:
        return rows
    first = {}
    for row in rows:
        first.setdefault(_digest(row.content), row)
    if len(first) < len(rows):
        dropped["a copy of another row"] += len(rows) - len(first)
    return list(first.values())


def _share(rows: list[Row], phase: Phase, config: DataConfig, seed: int, dropped: collections.Counter) -> list[Row]:
    """The phase's rows, drawn by the seed, in the order in which they were read."""
    split = shares(config.data_split)
    if split is None:
        return rows
    index = PHASES.index(phase)
    ends = [round(sum(split[:n]) * len(rows)) for n in (index, index + 1)]
    chosen = np.sort(_order(len(rows), seed)[ends[0] : ends[1]])
    if not len(chosen):
        raise DataError(
            f"data_split={config.data_split!r} leaves none of {len(rows)} rows to the {phase} phase; give it a "
            'larger share, or all phases all rows: --config.data.data_split=""'
        )
    dropped["other phases' shares"] += len(rows) - len(chosen)
    return [rows[index] for index in chosen]


def _order(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(count)


def _shuffled(examples: list[Example], seed: int) -> list[Example]:
    return [examples[index] for index in _order(len(examples), seed)]


def _examples(
    rows: list[Row],
    phase: Phase,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    dropped: collections.Counter,
    eos_ids: Sequence[int],
) -> list[Example]:
    texts = [row_texts(row, phase, config, tokenizer) for row in rows]
    examples = tokenized(rows, texts, tokenizer, config, dropped, eos_ids)
    if not config.deduplicate:
        return examples
    distinct: dict[tuple[bytes, ...], Example] = {}
    for example in examples:  # prompts that several pairs share, openings that are alike
        distinct.setdefault(_tokens_of(example), example)
    if len(distinct) < len(examples):
        dropped["the same prompt (and completion) as another row"] += len(examples) - len(distinct)
    return list(distinct.values())


def _without(held_out: list[Example], examples: list[Example], dropped: collections.Counter) -> list[Example]:
    """Those examples that are not held out too: what is trained on says nothing of what was learned."""
    known = set(map(_tokens_of, held_out))
    kept = [example for example in examples if _tokens_of(example) not in known]
    if len(kept) < len(examples):
        dropped["held out as well; --config.data.deduplicate=false keeps them"] += len(examples) - len(kept)
    return kept


def _tokens_of(example: Example) -> tuple[bytes, ...]:
    return tuple(part.tobytes() for part in (example.prompt, *example.completions))


# ---- batches -------------------------------------------------------------------------------------------------------


def _batched(
    train: list[list[Example]],
    held_out: list[Example],
    config: DataConfig,
    phase: Phase,
    pad: int,
    seed: int,
    report: str,
    mine: np.ndarray,
) -> Datasets:
    batch_size = getattr(config, f"{phase}_batch_size")
    longest = config.max_prompt_tokens if phase == "ppo" else config.max_tokens
    if phase == "ppo" and config.prompt_tokens is not None:
        longest = config.prompt_tokens
    buckets = _buckets(config, longest)
    packing = config.packing and phase != "ppo"
    groups: list = list(held_out)
    every = itertools.chain(*train, held_out)
    digest = _digest([[part.hex() for part in _tokens_of(example)] for example in every]).hex()
    if packing:
        longest *= 2 if phase == "reward" else 1  # a row holds both texts of a pair
        train, groups = [packed(examples, longest) for examples in train], packed(held_out, longest)
        slots = max(len(row) for examples in [*train, groups] for row in examples)
    rows = sum(map(len, train))
    if rows < batch_size:
        raise DataError(
            f"the {phase} phase has {rows} rows, fewer than a batch of {batch_size}: "
            f"--config.data.{phase}_batch_size={rows} or less. {report}"
        )

    def batch(examples: Sequence[Any], first_row: int) -> Any:
        """All rows are looked at, so that the processes agree on the width; only this process's are laid out."""
        local = [examples[row] for row in mine]
        if phase == "sft":
            local = local if packing else [[] if example is None else [example] for example in local]
            columns = longest if packing else _columns(examples, buckets)
            return text_batch(local, columns, pad)
        if phase == "reward" and packing:
            return packed_pairs(local, longest, slots, pad)
        if phase == "reward":
            return pair_batch(local, _columns(examples, buckets), pad)
        return prompt_batch(local, _columns(examples, buckets), pad, first_row + mine)

    parts = [_stream(examples, seed + index) for index, examples in enumerate(train)]
    stream = parts[0]
    if len(parts) > 1:
        weights = list(config.weights) or [len(examples) for examples in train]
        stream = grain.MapDataset.mix(parts, [weight / sum(weights) for weight in weights])
    batches = stream.batch(batch_size, batch_fn=lambda examples: batch(list(examples), 0))

    filled = [groups[i : i + batch_size] for i in range(0, len(groups), batch_size)]
    if filled:  # a prompt must have a token; a text or a pair may be empty
        filler = held_out[0] if phase == "ppo" else [] if packing else None
        filled[-1] = filled[-1] + [filler] * (batch_size - len(filled[-1]))
    evals = [batch(examples, FIRST_EVAL_ROW + index * batch_size) for index, examples in enumerate(filled)]
    return Datasets(batches, evals, rows, len(held_out), batch_size, report, digest, config.prefetch)


def _stream(examples: list, seed: int) -> grain.MapDataset:
    return grain.MapDataset.source(_Source(examples)).seed(seed).shuffle().repeat()


class _Source:
    """What grain takes as a random-access source."""

    def __init__(self, examples: list) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Any:
        return self._examples[index]


def _buckets(config: DataConfig, longest: int) -> list[int]:
    buckets = config.length_buckets or [-(-longest // 4), -(-longest // 2)]
    return sorted({bucket for bucket in buckets if 0 < bucket < longest} | {longest})


def _columns(examples: Sequence[Example | None], buckets: list[int]) -> int:
    longest = max((example.length for example in examples if example is not None), default=1)
    return width(longest, buckets)


def _my_rows(batch_size: int, mesh: Mesh | Layout | None) -> np.ndarray:
    if mesh is not None:
        return held_rows(batch_size, mesh)
    processes = jax.process_count()
    if batch_size % processes:
        raise ValueError(f"a batch of {batch_size} rows cannot be shared by {processes} processes; give a multiple.")
    share = batch_size // processes
    return np.arange(jax.process_index() * share, (jax.process_index() + 1) * share)
