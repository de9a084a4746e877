"""`create_datasets`: makes batches of the data at given paths; a batch is a pure function of (seed, step)."""

import collections
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal, cast

import grain
import jax
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from jax_rlhf.data.batches import FIRST_EVAL_ROW, packed, packed_pairs, pair_batch, prompt_batch, text_batch, width
from jax_rlhf.data.config import PHASES, DataConfig, shares
from jax_rlhf.data.data_error import DataError
from jax_rlhf.data.digests import examples_digest, row_digest
from jax_rlhf.data.formats import row_texts
from jax_rlhf.data.sources import Row, is_reader, read_rows
from jax_rlhf.data.splits import ONE_IN, Group, Source, drawn, grouped, share
from jax_rlhf.data.tokens import Example, pad_id, tokenized
from jax_rlhf.hub import end_ids
from jax_rlhf.parallel import Layout, local_row_indices
from jax_rlhf.settings import from_mapping

Phase = Literal["sft", "reward", "ppo"]
_HELD_OUT = "held out as well; --config.data.deduplicate=false keeps them"
_NOTHING_DRAWN = (
    "nothing of paths is held out: any whole prompt would exceed eval_rows, a tenth of the rows or a tenth of the "
    "prompts; set --config.data.eval_paths to evaluate"
)
_SHOWN = 150  # characters of the beginning and of the end of a text
_IMPLICIT = "pairs have no prompt column; the common beginning of both texts is taken as the prompt."
_REPEATED = (
    "rows have answers that begin with the text of their prompt, so the model would learn to repeat it. If chosen and "
    "rejected are whole conversations, set --config.data.prompt_column=none."
)
_TOOLS = "rows have tools, or tool calls, that the tokenizer's chat template does not render."
_NOT_A_CHAT = "rows are plain texts, for which the tokenizer's chat template is not used"
_AS_CHAT = "; --config.data.as_chat=true uses it for rows with a prompt."
_TEXT = (
    "rows have special tokens of the tokenizer in their texts, such as {!r}, which are tokenized as text. If a chat "
    "template has already rendered these texts, set --config.data.parse_special_tokens=true."
)
_PARSED = "rows have special tokens of the tokenizer in their texts, such as {!r}, which are tokenized as these tokens."
_TRAINED_ON = "held out, but in tokens equal to a prompt that is trained on"


@dataclasses.dataclass(frozen=True)
class Datasets:
    """The data of one phase.

    Attributes:
      train: `train[step]` is the batch of a step, for any step from 0 on; it depends on (seed, step) only.
      eval: held-out batches with `batch_size` rows each; filler rows complete the last one.
      train_rows: rows (or packed rows) per epoch.
      eval_rows: held-out rows, without filler.
      batch_size: rows per global batch.
      report: the number of rows that were read, trained on, held out, and left out for each reason.
      notes: further remarks on the data for the user, one sentence each.
      example: the first training row, decoded with special tokens.
      held_out: the examples of `eval`, in the same order.
      digest: checksum of all that the phase reads, in order. It differs between processes that read different files.
      widths: the possible widths of a batch, in tokens. The training step is compiled once per width.
      prefetch: batches that are made ahead of their use.
    """

    train: grain.MapDataset
    eval: Sequence[Any]
    train_rows: int
    eval_rows: int
    batch_size: int
    report: str
    digest: str
    widths: tuple[int, ...]
    prefetch: int = 2
    notes: tuple[str, ...] = ()
    example: str = ""
    held_out: Sequence[Example] = ()

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches per epoch; the last few rows of an epoch make up less than a batch."""
        return max(1, self.train_rows // self.batch_size)

    def batches(self, start: int, stop: int) -> Iterator[Any]:
        """The batches of steps `start` to `stop` − 1, prefetched by a background thread."""
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=self.prefetch)
        return iter(self.train[start:stop].to_iter_dataset(options))


def create_datasets(
    config: Any,
    tokenizer: PreTrainedTokenizerBase,
    phase: Phase,
    *,
    seed: int,
    eos_ids: Sequence[int] | None = None,
    eval_rows: int | None = None,
    mesh: Mesh | Layout | None = None,
    vocab_size: int | None = None,
) -> Datasets:
    """Reads, splits, filters, tokenizes and batches the data of one phase.

    Args:
      config: a `DataConfig`, or a mapping of its fields.
      tokenizer: the model's tokenizer.
      phase: "sft" (batches are `TextBatch`), "reward" (`PairBatch`; packed: `PackedPairs`) or "ppo" (`Prompts`).
      seed: for the split and the order of rows.
      eos_ids: ids of tokens that end an answer; None = the tokenizer's EOS.
      eval_rows: the phase evaluates on at most so many held-out rows per path; None = config.eval_rows. How many rows
        of `paths` are held out depends on config.eval_rows only, which all phases share.
      mesh: the mesh for which batches are made; None = one device per process. Each process makes the rows that are
        local to it. It still reads all data, because the split, the order and the widths depend on all rows.
      vocab_size: the number of rows of the model's embedding; a token beyond it is an error. None = no check.

    Returns:
      The data; each batch has the rows of the global batch that are local to this process.

    Raises:
      DataError: a row is invalid, columns are missing, or no row is left; the message says which and why.
      FileNotFoundError: a path does not exist.
      ValueError: a setting is invalid.
    """
    config = from_mapping(DataConfig, config, "config.data")
    if phase not in PHASES:
        raise ValueError(f"phase={phase!r} must be one of {', '.join(PHASES)}.")
    if not config.paths:
        raise DataError("config.data.paths is empty; set it to the data, such as --config.data.paths=preferences.jsonl")
    pad, eos_ids = pad_id(tokenizer, config, vocab_size), end_ids(tokenizer) if eos_ids is None else eos_ids
    held_out_rows = config.eval_rows if eval_rows is None else eval_rows
    reader = _ExampleReader(phase, config, tokenizer, seed, eos_ids, held_out_rows, vocab_size)
    train, held_out = reader.train_and_held_out()
    for path, examples in zip(config.paths, train, strict=True):
        if not examples:
            raise DataError(f"{path}: no row is left for the {phase} phase. {reader.report(0, len(held_out))}")
    report = f"{phase} data: " + reader.report(sum(map(len, train)), len(held_out))
    local = _local_rows(getattr(config, f"{phase}_batch_size"), mesh)
    datasets = _batched(train, held_out, config=config, phase=phase, pad=pad, seed=seed, report=report, local=local)
    notes = tuple(f"{phase} data: {count:,} {what}" for what, count in reader.notes.most_common() if count)
    example = _decoded(phase, next(itertools.chain(*train)), tokenizer)
    return dataclasses.replace(datasets, notes=notes, example=example, held_out=held_out)


@dataclasses.dataclass
class _ExampleReader:
    """Reads the examples of a phase, and counts the rows that are read, held out and left out."""

    phase: Phase
    config: DataConfig
    tokenizer: PreTrainedTokenizerBase
    seed: int
    eos_ids: Sequence[int]
    eval_rows: int
    vocab_size: int | None = None
    read: int = 0
    dropped: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    notes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    note: str = ""
    special: str = ""

    def train_and_held_out(self) -> tuple[list[list[Example]], list[Example]]:
        """(training examples by path, held-out examples), with no prompt in common."""
        config = self.config
        sources = self._share([self._rows(path, "train", config.split) for path in config.paths])
        readers = list(filter(is_reader, config.paths))
        eval_sources = [self._rows(path, "eval", config.eval_split) for path in config.eval_paths or readers]
        groups = set() if config.eval_paths else drawn(sources, config.eval_rows, self.seed)
        if not (groups or config.eval_paths) and any(len(s.rows) >= ONE_IN and not is_reader(s.path) for s in sources):
            self.note = _NOTHING_DRAWN
        train = [self._without(source, groups, eval_sources) for source in sources]
        from_paths = [s.where(group in groups for group in s.groups) for s in sources if not is_reader(s.path)]
        held_out = [self._at_most(self._examples(source)) for source in eval_sources]
        train = [self._examples(source) for source in train]
        if config.deduplicate:
            train = [self._unlike(held_out, examples, _HELD_OUT) for examples in train]
        drawn_examples = [self._unlike(train, self._examples(source), _TRAINED_ON) for source in from_paths]
        return train, list(itertools.chain(*map(self._at_most, drawn_examples), *held_out))

    def report(self, used: int, held_out: int) -> str:
        """The numbers of rows read, used, held out and left out; they add up."""
        parts = [f"{self.read:,} rows read, {used:,} to train on, {held_out:,} held out"]
        parts += [f"left out: {count:,} ({reason})" for reason, count in self.dropped.most_common() if count]
        return "; ".join([*parts, self.note] if self.note else parts) + "."

    def _rows(self, path: str, split: str, hub_split: str) -> Source:
        config = self.config
        rows = read_rows(path, phase=self.phase, split=split, hub_split=hub_split, revision=config.revision)
        self.read += len(rows)
        if split == "train":
            rows = _distinct(rows, config, self.dropped)
        return grouped(path, rows, config, self.tokenizer)

    def _share(self, sources: list[Source]) -> list[Source]:
        split = shares(self.config.data_split)
        if split is None:
            return sources
        chosen = share(sources, split, self.phase, self.seed)
        for source, kept in zip(sources, chosen, strict=True):
            if not kept.rows:
                raise DataError(
                    f"{source.path}: data_split={self.config.data_split!r} leaves none of {len(source.rows)} rows to "
                    f"the {self.phase} phase (they have {len(set(source.groups))} prompts, and rows with the same "
                    "prompt go to the same phase); give the phase a larger share, or give all rows to all phases: "
                    '--config.data.data_split=""'
                )
            self.dropped["other phases' shares"] += len(source.rows) - len(kept.rows)
        return chosen

    def _without(self, source: Source, groups: set[Group], eval_sources: list[Source]) -> Source:
        """The rows whose prompt is not held out."""
        kept = source.where(group not in groups for group in source.groups)
        if is_reader(source.path):  # rows of files are counted as held out instead
            self.dropped["held out of another path"] += len(source.rows) - len(kept.rows)
        if not self.config.deduplicate:
            return kept
        # A reader splits the rows of each phase itself, and it compares whole prompts, not their first tokens.
        held_out = set(itertools.chain(*(s.prompts if is_reader(s.path) else s.groups for s in eval_sources)))
        disjoint = kept.where(
            group not in held_out and prompt not in held_out
            for group, prompt in zip(kept.groups, kept.prompts, strict=True)
        )
        self.dropped[_HELD_OUT] += len(kept.rows) - len(disjoint.rows)
        return disjoint

    def _examples(self, source: Source) -> list[Example]:
        """Tokenizes the rows, removes duplicates and shuffles them by the seed."""
        texts = [row_texts(row, self.phase, self.config, self.tokenizer) for row in source.rows]
        self.notes[_IMPLICIT] += sum(text.implicit for text in texts)
        self.notes[_REPEATED] += sum(text.repeated for text in texts)
        self.notes[_TOOLS] += sum(text.tools_unwritten for text in texts)
        special = [text.special for text in texts if text.special]
        self.special = self.special or next(iter(special), "")
        what = _PARSED if self.config.parse_special_tokens else _TEXT
        self.notes[what.format(self.special)] += len(special)
        if self.tokenizer.chat_template is not None:
            what = _NOT_A_CHAT + (", as they have no prompt column." if self.config.as_chat else _AS_CHAT)
            self.notes[what] += sum(not text.templated for text in texts)
        examples = tokenized(
            source.rows, texts, self.tokenizer, self.config, self.dropped, self.eos_ids, vocab_size=self.vocab_size
        )
        if self.config.deduplicate:
            distinct: dict[tuple[bytes, ...], Example] = {}
            for example in examples:  # for PPO: pairs with the same prompt, texts with the same first tokens
                distinct.setdefault(_tokens_of(example), example)
            self.dropped["the same prompt (and completion) as another row"] += len(examples) - len(distinct)
            examples = list(distinct.values())
        return [examples[index] for index in np.random.default_rng(self.seed).permutation(len(examples))]

    def _unlike(self, others: list[list[Example]], examples: list[Example], reason: str) -> list[Example]:
        """Examples without a prompt of `others`, in tokens: truncation or a template can make two prompts equal."""
        prompts = {_prompt_of(other) for other in itertools.chain(*others)}
        kept = [example for example in examples if _prompt_of(example) not in prompts]
        self.dropped[reason] += len(examples) - len(kept)
        return kept

    def _at_most(self, examples: list[Example]) -> list[Example]:
        self.dropped[f"more to hold out than eval_rows={self.eval_rows}"] += max(0, len(examples) - self.eval_rows)
        return examples[: self.eval_rows]


def _decoded(phase: str, example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """One example as the model sees it, so that the user can notice missing or doubled special tokens."""
    names = {"sft": ["completion"], "reward": ["chosen", "rejected"], "ppo": []}[phase]
    parts = {"prompt": example.prompt} | dict(zip(names, example.completions, strict=True))
    texts = (
        f"{name} ({len(ids)} tokens) {_middle_cut(cast(str, tokenizer.decode(ids)))!r}" for name, ids in parts.items()
    )
    return f"{phase} data, an example: {', '.join(texts)}"


def _middle_cut(text: str) -> str:
    """A long text reduced to its beginning and end, where its special tokens are."""
    return text if len(text) <= 2 * _SHOWN else f"{text[:_SHOWN]} … {text[-_SHOWN:]}"


def _distinct(rows: list[Row], config: DataConfig, dropped: collections.Counter) -> list[Row]:
    """Removes duplicate rows. It is called before the split, so that the phases' shares are disjoint."""
    if not config.deduplicate:
        return rows
    first = {}
    for row in rows:
        first.setdefault(row_digest(row.content), row)
    if len(first) < len(rows):
        dropped["a copy of another row"] += len(rows) - len(first)
    return list(first.values())


def _tokens_of(example: Example) -> tuple[bytes, ...]:
    return tuple(part.tobytes() for part in (example.prompt, *example.completions))


def _prompt_of(example: Example) -> tuple[bytes, ...]:
    """What held-out examples must not share with training examples: the prompt, or without one the whole example."""
    return (example.prompt.tobytes(),) if example.has_prompt else _tokens_of(example)


# ---- batches -------------------------------------------------------------------------------------------------------


def _batched(
    train: list[list[Any]],
    held_out: list[Example],
    *,
    config: DataConfig,
    phase: Phase,
    pad: int,
    seed: int,
    report: str,
    local: np.ndarray,
) -> Datasets:
    """Batches the examples; `local` has the indices of the local rows in a global batch."""
    batch_size = getattr(config, f"{phase}_batch_size")
    longest = config.max_prompt_tokens if phase == "ppo" else config.max_tokens
    if phase == "ppo" and config.prompt_tokens is not None:
        longest = config.prompt_tokens
    buckets = _buckets(config, longest)
    packing = config.packing and phase != "ppo"
    groups: list = list(held_out)
    every = itertools.chain(*train, held_out)
    digest = examples_digest(every, phase)
    if packing:
        longest *= 2 if phase == "reward" else 1  # a row has room for both texts of a pair
        train, groups = [packed(examples, longest) for examples in train], packed(held_out, longest)
        slots = max(len(row) for examples in [*train, groups] for row in examples)
    lengths = {example.length for example in itertools.chain(*([] if packing else [*train, held_out]))}
    widths = (longest,) if packing else tuple(sorted({width(length, buckets) for length in lengths}))
    every = itertools.chain(*([] if packing else [*train, held_out]))
    names = sorted({name for example in every for name in example.columns})
    rows = sum(map(len, train))
    if rows < batch_size:
        raise DataError(
            f"the {phase} phase has {rows} rows, fewer than a batch of {batch_size}: set "
            f"--config.data.{phase}_batch_size={rows} or less. {report}"
        )

    def batch(examples: Sequence[Any], first_row: int) -> Any:
        """The local rows as a batch; its width comes from all rows, so that all processes agree on it."""
        chosen = [examples[row] for row in local]
        if phase == "sft":
            chosen = chosen if packing else [[] if example is None else [example] for example in chosen]
            columns = longest if packing else _columns(examples, buckets)
            return text_batch(chosen, columns, pad)
        if phase == "reward" and packing:
            return packed_pairs(chosen, longest, slots, pad)
        if phase == "reward":
            return pair_batch(chosen, _columns(examples, buckets), pad)
        return prompt_batch(chosen, _columns(examples, buckets), pad, first_row + local, names)

    parts = [_stream(examples, seed + index) for index, examples in enumerate(train)]
    stream = parts[0]
    if len(parts) > 1:
        weights = list(config.weights) or [len(examples) for examples in train]
        stream = grain.MapDataset.mix(parts, [weight / sum(weights) for weight in weights])
    batches = stream.batch(batch_size, batch_fn=lambda examples: batch(list(examples), 0))

    filled = [groups[i : i + batch_size] for i in range(0, len(groups), batch_size)]
    if filled:  # a prompt must have at least one token; a text or a pair may be empty
        filler = held_out[0] if phase == "ppo" else [] if packing else None
        filled[-1] = filled[-1] + [filler] * (batch_size - len(filled[-1]))
    evals = [batch(examples, FIRST_EVAL_ROW + index * batch_size) for index, examples in enumerate(filled)]
    return Datasets(batches, evals, rows, len(held_out), batch_size, report, digest, widths, config.prefetch)


def _stream(examples: list, seed: int) -> grain.MapDataset:
    return grain.MapDataset.source(_Source(examples)).seed(seed).shuffle().repeat()


class _Source:
    """A list as grain's random-access data source."""

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


def _local_rows(batch_size: int, mesh: Mesh | Layout | None) -> np.ndarray:
    """Indices of this process's rows in a global batch, int[b]."""
    if mesh is not None:
        return local_row_indices(batch_size, mesh)
    processes = jax.process_count()
    if batch_size % processes:
        raise ValueError(
            f"a batch of {batch_size} rows cannot be shared by {processes} processes: use a multiple of {processes}."
        )
    share = batch_size // processes
    return np.arange(jax.process_index() * share, (jax.process_index() + 1) * share)
