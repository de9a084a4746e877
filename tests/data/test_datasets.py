"""`create_datasets`: splits, filters, the report, the order of rows, packing, and batches of several processes."""

import collections
import json
import re

import jax
import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jax_rlhf.data import DataConfig, DataError, create_datasets
from jax_rlhf.data.batches import packed, packed_pairs, pair_batch, text_batch
from jax_rlhf.data.formats import Texts
from jax_rlhf.data.sources import Row
from jax_rlhf.data.tokens import Example, tokenized
from tests.data import tiny

SIZES = {"sft_batch_size": 2, "reward_batch_size": 2, "ppo_batch_size": 2, "max_tokens": 8, "max_prompt_tokens": 4}


def create(paths, phase, *, tokenizer=None, seed=0, **config):
    config = {"paths": paths if isinstance(paths, tuple) else (paths,), **SIZES, **config}
    return create_datasets(config, tokenizer or tiny.tokenizer(), phase, seed=seed)


def pairs(count):
    return [{"prompt": text, "chosen": f"{text} a", "rejected": f"{text} b"} for text in tiny.letters(count)]


def texts_of(datasets, steps):
    """The real tokens of each row of the first `steps` batches."""
    rows = []
    for step in range(steps):
        batch = datasets.train[step]
        rows += [tuple(row[real].tolist()) for row, real in zip(batch.tokens, batch.mask, strict=True)]
    return rows


def test_an_sft_batch_equals_the_batch_written_by_hand(tmp_path):
    file = tiny.write(
        tmp_path / "x.jsonl", [{"prompt": "a b", "completion": "c"}, {"prompt": "d", "completion": "e f g h"}]
    )
    batch = create(file, "sft", tokenizer=tiny.tokenizer(bos=True), eval_rows=1).train[0]
    rows = {row[1]: index for index, row in enumerate(batch.tokens.tolist())}
    short, long = rows[tiny.ids("a")[0]], rows[tiny.ids("d")[0]]
    assert batch.tokens[short].tolist() == [*tiny.ids("<bos> a b c <eos>"), 0, 0, 0]
    assert batch.tokens[long].tolist() == [*tiny.ids("<bos> d e f g h <eos>"), 0]
    assert batch.mask[short].tolist() == [True] * 5 + [False] * 3
    assert batch.completion_mask[short].tolist() == [False] * 3 + [True] * 2 + [False] * 3
    assert batch.positions[long].tolist() == [*range(7), 0]


def test_a_chat_has_the_special_tokens_of_its_template_and_no_others(tmp_path):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    file = tiny.write(tmp_path / "x.jsonl", [{"messages": messages}] * 2)
    batch = create(file, "sft", tokenizer=tiny.tokenizer(bos=True), deduplicate=False).train[0]
    assert batch.tokens[0, batch.mask[0]].tolist() == tiny.ids("<user> a <eos> <assistant> b <eos>")
    assert batch.completion_mask[0].sum() == 2


def test_a_reward_batch_equals_the_batch_written_by_hand(tmp_path):
    rows = [{"prompt": "a", "chosen": "b c", "rejected": "d", "margin": 0.5}] * 2
    batch = create(tiny.write(tmp_path / "x.jsonl", rows), "reward", deduplicate=False).train[0]
    assert batch.chosen[0].tolist() == tiny.ids("a b c <eos>")
    assert batch.rejected[0].tolist() == [*tiny.ids("a d <eos>"), 0]
    assert batch.rejected_mask[0].tolist() == [True, True, True, False]
    assert batch.margin.tolist() == [0.5, 0.5]


def test_a_ppo_batch_has_left_padded_prompts_and_their_columns(tmp_path):
    rows = [{"prompt": "a b c", "answer": 1}, {"prompt": "d", "answer": 2}]
    batch = create(tiny.write(tmp_path / "x.jsonl", rows), "ppo").train[0]
    row = batch.columns["answer"].index(2)
    assert batch.tokens[row].tolist() == [0, 0, 0, *tiny.ids("d")]
    assert batch.mask[row].tolist() == [False, False, False, True]
    assert batch.row_ids.tolist() == [0, 1]
    rows = [{"prompt": "a b c", "answer": 1, "source": "x"}, {"prompt": "d", "answer": 2}]
    batch = create(tiny.write(tmp_path / "y.jsonl", rows), "ppo").train[0]
    row = batch.columns["answer"].index(2)
    assert (batch.columns["source"][row], batch.columns["source"][1 - row]) == (None, "x")


def test_a_column_missing_in_one_data_set_is_none_in_its_rows_only(tmp_path):
    """Every batch has the column, because a reward function may require it."""
    files = [
        tiny.write(tmp_path / "one.jsonl", [{"prompt": text, "answer": text} for text in tiny.letters(30)]),
        tiny.write(tmp_path / "two.jsonl", [{"prompt": text} for text in tiny.letters(30, 100)]),
    ]
    data = create(tuple(files), "ppo", ppo_batch_size=1)
    answers = [data.train[step].columns["answer"][0] for step in range(60)]
    prompts = [tiny.tokenizer().decode(data.train[step].tokens[0], skip_special_tokens=True) for step in range(60)]
    assert {answer is None for answer in answers} == {True, False}
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer == (prompt if prompt in tiny.letters(30) else None)


def test_a_batch_is_a_pure_function_of_seed_and_step(tmp_path):
    file = tiny.write(tmp_path / "x.jsonl", pairs(40))
    one, other = create(file, "ppo", eval_rows=1), create(file, "ppo", eval_rows=1)
    assert texts_of(one, 30) == texts_of(other, 30)
    streamed = [batch.tokens.tolist() for batch in one.batches(5, 9)]
    assert streamed == [other.train[step].tokens.tolist() for step in range(5, 9)]
    assert texts_of(one, 30) != texts_of(create(file, "ppo", eval_rows=1, seed=1), 30)


def test_each_epoch_has_every_row_once_in_a_different_order(tmp_path):
    datasets = create(tiny.write(tmp_path / "x.jsonl", pairs(21)), "ppo", eval_rows=1)
    assert (datasets.train_rows, datasets.eval_rows, datasets.steps_per_epoch) == (20, 1, 10)
    odd = create(tiny.write(tmp_path / "y.jsonl", pairs(22)), "ppo", eval_rows=1)
    assert (odd.train_rows, odd.steps_per_epoch) == (21, 10)  # the last row is in a batch of the next epoch
    rows = texts_of(datasets, 20)
    assert len(set(rows[:20])) == 20
    assert set(rows[20:]) == set(rows[:20])
    assert rows[20:] != rows[:20]


def test_each_path_is_shuffled_differently(tmp_path):
    """If two files of equal length were shuffled alike, rows with the same index would always be neighbours."""
    files = [
        tiny.write(tmp_path / f"{first}.jsonl", [{"prompt": f"{first} {text}"} for text in tiny.letters(20)])
        for first in "yz"
    ]
    rows = texts_of(create(tuple(files), "ppo", eval_rows=1), 19)
    one, other = ([row[1:] for row in rows if row[0] == tiny.ids(first)[0]] for first in "yz")
    assert len(one) == len(other) == 19
    assert one != other


def test_data_split_gives_the_phases_disjoint_prompts(tmp_path):
    file = tiny.write(tmp_path / "x.jsonl", pairs(100))
    prompts = {}
    for phase, share in (("sft", 20), ("reward", 40), ("ppo", 40)):
        datasets = create(file, phase, data_split="2,4,4", eval_rows=2)
        assert (datasets.train_rows, datasets.eval_rows) == (share - 2, 2)
        batches = [datasets.train[step] for step in range(datasets.steps_per_epoch)] + datasets.eval
        tokens = np.concatenate([batch.chosen if phase == "reward" else batch.tokens for batch in batches])
        prompts[phase] = {tuple(row[-3:] if phase == "ppo" else row[:3]) for row in tokens.tolist()}
        assert len(prompts[phase]) == share
    assert not prompts["sft"] & prompts["reward"]
    assert not prompts["sft"] & prompts["ppo"]
    assert not prompts["reward"] & prompts["ppo"]


def test_a_mixture_follows_the_weights_or_else_the_sizes_of_the_files(tmp_path):
    one = tiny.write(tmp_path / "one.jsonl", [{"prompt": text} for text in tiny.letters(30)])
    other = tiny.write(tmp_path / "other.jsonl", [{"prompt": f"z {text}"} for text in tiny.letters(90)])
    datasets = create((one, other), "ppo", weights=(3.0, 1.0))
    rows = texts_of(datasets, 100)
    assert sum(len(row) == 3 for row in rows) / len(rows) == pytest.approx(0.75, abs=0.03)
    by_size = texts_of(create((one, other), "ppo"), 100)
    assert sum(len(row) == 3 for row in by_size) / len(by_size) == pytest.approx(0.25, abs=0.03)


def test_the_report_counts_the_rows_that_each_filter_leaves_out(tmp_path):
    rows = [*pairs(30), *pairs(2), {"prompt": "a b c d e f g h", "chosen": "a", "rejected": "b"}]
    rows += [{"prompt": "z", "chosen": "a", "rejected": "a"}, {"prompt": "y", "chosen": " ", "rejected": "a"}]
    first = rows
    datasets = create(tiny.write(tmp_path / "x.jsonl", rows), "reward", on_bad_row="drop")
    for reason in ("2 (a copy", "1 (longer than max_tokens=8)", "1 (chosen and rejected are", "1 (an empty completion"):
        assert f"left out: {reason}" in datasets.report
    assert "35 rows read" in datasets.report
    rows = [*pairs(30), {"prompt": "z", "chosen": "a", "rejected": " ".join("a" * 8)}]
    datasets = create(tiny.write(tmp_path / "y.jsonl", rows), "reward")
    assert "left out: 1 (longer than max_tokens=8)" in datasets.report
    datasets = create(
        tiny.write(tmp_path / "z.jsonl", [*({"text": "a b"} for _ in "abc"), {"text": "<eos>"}]),
        "sft",
        deduplicate=False,
        parse_special_tokens=True,
    )
    assert "left out: 1 (a single token, with no token before it)" in datasets.report
    datasets = create(tiny.write(tmp_path / "x.jsonl", first), "ppo")
    assert "1 (a prompt longer than max_prompt_tokens=4)" in datasets.report


def test_held_out_rows_are_not_trained_on(tmp_path):
    file, held_out = tiny.write(tmp_path / "x.jsonl", pairs(20)), tiny.write(tmp_path / "y.jsonl", pairs(6)[3:])
    datasets = create(file, "ppo", eval_paths=(held_out,))
    assert (datasets.train_rows, datasets.eval_rows) == (17, 3)
    held = {tuple(row) for batch in datasets.eval for row in batch.tokens.tolist()}
    assert not held & {tuple(row) for step in range(30) for row in datasets.train[step].tokens.tolist()}
    assert "left out: 3 (held out as well" in datasets.report
    assert create(file, "ppo", eval_paths=(held_out,), deduplicate=False).train_rows == 20
    with pytest.raises(DataError, match=r"no row is left.* 20 \(held out as well; --config.data.deduplicate=false"):
        create(file, "ppo", eval_paths=(file,))


def test_the_digest_includes_the_held_out_rows(tmp_path):
    """A process, or a resumed run, that reads different held-out rows has a different digest."""
    file, digests = tiny.write(tmp_path / "x.jsonl", pairs(20)[6:]), set()
    for name, rows in (("y", pairs(3)), ("z", pairs(4)), ("again", pairs(3))):
        held_out = tiny.write(tmp_path / f"{name}.jsonl", rows)
        digests.add(create(file, "sft", eval_paths=(held_out,)).digest)
    assert len(digests) == 2


def test_real_tokens_does_not_count_pads():
    pair = Example(np.arange(2), (np.arange(3), np.arange(1)))
    assert int(pair_batch([pair, None], 8, 0).real_tokens()) == 5 + 3
    assert int(packed_pairs([[pair, pair], []], 20, 2, 0).real_tokens()) == 2 * (5 + 3)
    assert int(text_batch([[pair], []], 8, 0).real_tokens()) == 5


def test_a_reader_returns_the_held_out_rows_itself():
    datasets = create("tests.data.tiny:reader", "sft", eval_rows=7)
    assert (datasets.train_rows, datasets.eval_rows) == (20, 7)
    rows = [row[mask] for batch in datasets.eval for row, mask in zip(batch.tokens, batch.mask, strict=True)]
    # The "e" is of "eval"; training rows end with the "t" of "train".
    assert {row[-2] for row in rows if len(row)} == set(tiny.ids("e"))


@pytest.mark.parametrize("phase", ["sft", "reward", "ppo"])
def test_the_report_accounts_for_every_row(phase, tmp_path):
    rows = [*pairs(60), *pairs(5), {"prompt": "a b c d e f g h", "chosen": "a", "rejected": "b"}]
    rows += [{"prompt": "z", "chosen": "a", "rejected": "a"}, {"prompt": "y", "chosen": " ", "rejected": "a"}]
    file, held_out = tiny.write(tmp_path / "x.jsonl", rows), tiny.write(tmp_path / "y.jsonl", pairs(12)[8:])
    for config in ({}, {"data_split": "1,2,3"}, {"eval_paths": (held_out,), "eval_rows": 3}):
        report = create(file, phase, on_bad_row="drop", **config).report
        read, *parts = (int(number.replace(",", "")) for number in re.findall(r"(?<![=\d])\d[\d,]*(?= [a-z(])", report))
        assert read == sum(parts), report


def test_long_rows_are_cut_with_too_long_truncate(tmp_path):
    row = {"prompt": "a b c d e f", "completion": "g h i j k l"}
    file = tiny.write(tmp_path / "x.jsonl", [row] * 2)
    batch = create(file, "sft", too_long="truncate", deduplicate=False).train[0]
    assert batch.tokens[0].tolist() == tiny.ids("c d e f g h i j")
    batch = create(file, "ppo", too_long="truncate", deduplicate=False).train[0]
    assert batch.tokens[0].tolist() == tiny.ids("c d e f")
    few = {"max_prompt_tokens": 9, "max_tokens": 4}  # one token of the completion is kept
    batch = create(file, "sft", too_long="truncate", deduplicate=False, **few).train[0]
    assert batch.tokens[0].tolist() == tiny.ids("d e f g")


def test_a_truncated_prompt_keeps_its_bos(tmp_path):
    file = tiny.write(tmp_path / "x.jsonl", [{"prompt": "a b c d e f", "completion": "g h"}] * 2)
    options = {"tokenizer": tiny.tokenizer(bos=True), "too_long": "truncate", "deduplicate": False}
    assert create(file, "ppo", **options).train[0].tokens[0].tolist() == tiny.ids("<bos> d e f")
    assert create(file, "sft", **options).train[0].tokens[0].tolist()[:7] == tiny.ids("<bos> d e f g h <eos>")
    one = create(file, "ppo", max_prompt_tokens=1, **options).train[0]
    assert one.tokens[0].tolist() == tiny.ids("f")  # BOS and a token of the prompt do not both fit
    chat = [{"messages": [{"role": "user", "content": "a b c d"}]}] * 2  # the template writes no BOS
    without = create(tiny.write(tmp_path / "y.jsonl", chat), "ppo", **options).train[0]
    assert without.tokens[0].tolist() == tiny.ids("c d <eos> <assistant>")


def test_a_text_that_begins_with_bos_gets_no_second_bos(tmp_path):
    """A text may begin with BOS because a chat template was applied before the data was saved."""
    options = {"tokenizer": tiny.tokenizer(bos=True), "deduplicate": False, "eval_rows": 1}
    for begin in ("", "<bos> "):
        pair = {"prompt": f"{begin}a", "chosen": "b", "rejected": "c"}
        file = tiny.write(tmp_path / "x.jsonl", [pair] * 2)
        assert create(file, "ppo", **options).train[0].tokens[0, -2:].tolist() == tiny.ids("<bos> a")
        assert create(file, "ppo", prompt_tokens=2, **options).train[0].tokens[0].tolist() == tiny.ids("<bos> a")
        assert create(file, "sft", **options).train[0].tokens[0, :4].tolist() == tiny.ids("<bos> a b <eos>")
        batch = create(file, "reward", **options).train[0]
        assert batch.chosen[0, :4].tolist() == tiny.ids("<bos> a b <eos>")
        assert batch.rejected[0, :4].tolist() == tiny.ids("<bos> a c <eos>")
        batch = create(tiny.write(tmp_path / "y.jsonl", [{"text": f"{begin}a b"}] * 2), "sft", **options).train[0]
        assert batch.tokens[0, :4].tolist() == tiny.ids("<bos> a b <eos>")
        assert batch.completion_mask[0, :4].tolist() == [False, True, True, True]  # BOS is not learned
        pair = [{"prompt": "", "chosen": f"{begin}b", "rejected": "c"}] * 2
        batch = create(tiny.write(tmp_path / "z.jsonl", pair), "reward", **options).train[0]
        assert batch.chosen[0, :3].tolist() == tiny.ids("<bos> b <eos>")


@pytest.mark.parametrize("phase", ["sft", "reward", "ppo"])
def test_half_a_surrogate_pair_is_an_error_that_names_the_row(tmp_path, phase):
    """JSON can contain half of a surrogate pair, but tokenizers reject it."""
    rows = pairs(30)
    rows[7] |= {"prompt": "a \ud83d", "chosen": "b \ud83d"}
    file = tiny.write(tmp_path / "x.jsonl", rows)
    with pytest.raises(DataError, match=r"x.jsonl, line 8: half of a surrogate pair, which is not a character, in 'a "):
        create(file, phase, max_tokens=12)
    data = create(file, phase, max_tokens=12, on_bad_row="drop")
    assert "left out: 1 (half of a surrogate pair" in data.report
    create(file, phase, max_tokens=12, on_bad_row="drop", prompt_tokens=1)


def test_sft_leaves_out_and_counts_completions_with_a_false_label(tmp_path):
    rows = [{"prompt": text, "completion": "z", "label": i % 3 > 0} for i, text in enumerate(tiny.letters(30))]
    file = tiny.write(tmp_path / "x.jsonl", rows)
    data = create(file, "sft", eval_rows=1)
    assert "left out: 10 (an undesired completion, with a false label;" in data.report
    assert {row[-2] for row in texts_of(data, 5)} == {tiny.WORDS.index("z")}
    assert data.train_rows + data.eval_rows == 20
    prompts = create(file, "ppo", eval_rows=1)
    assert prompts.train_rows + prompts.eval_rows == 30


def test_an_answer_partly_omitted_by_the_template_is_an_error_or_dropped(tmp_path):
    template = tiny.TEMPLATE.replace("m.content", "m.content.split('=')[-1]")
    turns = lambda answer: [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]  # noqa: E731
    rows = [{"messages": turns(f"x = {text}" if text.startswith("b") else text)} for text in tiny.letters(30)]
    rows[0]["messages"] = turns("x = a a a")
    file, tokenizer = tiny.write(tmp_path / "x.jsonl", rows), tiny.tokenizer(template=template)
    with pytest.raises(DataError, match=r"x.jsonl, line \d+: the chat template leaves out a part .* 'x = "):
        create(file, "sft", tokenizer=tokenizer)
    report = create(file, "sft", tokenizer=tokenizer, on_bad_row="drop", eval_rows=1).report
    left_out = sum("=" in row["messages"][1]["content"] for row in rows)
    assert f"left out: {left_out} (the chat template leaves out a part of the answer)" in report


def test_notes_say_how_ambiguous_rows_are_read(tmp_path):
    def notes(rows, phase="sft", **options):
        return create(tiny.write(tmp_path / "x.jsonl", rows), phase, eval_rows=1, **options).notes

    apart = [{"prompt": text, "chosen": " a", "rejected": " b"} for text in tiny.letters(20)]
    plain = notes(apart)
    assert plain == (
        "sft data: 20 rows are plain texts, for which the tokenizer's chat template is not used; "
        "--config.data.as_chat=true uses it for rows with a prompt.",
    )
    assert notes(apart, as_chat=True, max_tokens=12) == ()
    assert notes(apart, tokenizer=tiny.tokenizer(template=None)) == ()
    (alone,) = notes([{"text": text} for text in tiny.letters(20)], as_chat=True)
    assert alone.endswith("the tokenizer's chat template is not used, as they have no prompt column.")
    implicit = [{name: pair[name] for name in ("chosen", "rejected")} for pair in pairs(20)]
    first, _ = notes(implicit, "reward")
    assert (
        first
        == "reward data: 20 pairs have no prompt column; the common beginning of both texts is taken as the prompt."
    )
    whole = [row | {name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in apart]
    first, _ = notes(whole, "reward")
    assert first.startswith("reward data: 20 rows have answers that begin with the text of their prompt")
    one, other = (
        create(tiny.write(tmp_path / "x.jsonl", rows), "reward", eval_rows=1, prompt_column=column)
        for rows, column in ((apart, "prompt"), (whole, "none"))
    )
    assert one.digest == other.digest  # the setting that the note recommends removes the repetition
    chats = [
        {"messages": [{"role": "user", "content": t}, {"role": "assistant", "content": "b"}]} for t in tiny.letters(20)
    ]
    assert notes(chats, max_tokens=12) == ()


def test_a_completion_is_tokenized_as_the_continuation_of_its_prompt():
    """A sentencepiece tokenizer prepends a space to each text, so a completion tokenized alone would gain a space."""
    vocabulary = {"<eos>": 0, "▁a": 1, "▁b": 2, "▁": 3, "▁c": 4}
    bare = Tokenizer(models.BPE(vocabulary, [], unk_token="<eos>", ignore_merges=True))
    bare.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bare.pre_tokenizer = pre_tokenizers.Split(Regex("▁[^▁]*"), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<eos>", pad_token="<eos>")
    assert tokenizer(" b", add_special_tokens=False).input_ids == [3, 2]
    texts = [Texts("a", (" b",), False, 0.0, {})]
    (example,) = tokenized([Row({}, "x", 1)], texts, tokenizer, DataConfig(), collections.Counter(), (0,))
    assert (example.prompt.tolist(), example.completions[0].tolist()) == ([1], [2, 0])


@pytest.mark.parametrize(
    ("completion", "eos_ids", "wanted"),
    [
        ("b", None, "b <eos>"),
        ("b <user> c", (4, 3), "b <user>"),  # text that a template writes after the end of the turn is cut
        ("b <eos> <user>", (3, 1), "b <eos>"),  # with parse_special_tokens, the text <eos> is the token
        ("b", (3, 1), "b <eos>"),
        ("b", (3,), "b <user>"),
        ("<user> b c d", (3,), "<user> b c d <user>"),  # an end is searched for only near the end of the text
    ],
)
def test_a_completion_ends_with_one_of_the_eos_ids(tmp_path, completion, eos_ids, wanted):
    file = tiny.write(tmp_path / "x.jsonl", [{"prompt": "a", "completion": completion}] * 2)
    config = {"paths": (file,), **SIZES, "deduplicate": False, "parse_special_tokens": True}
    batch = create_datasets(config, tiny.tokenizer(), "sft", seed=0, eos_ids=eos_ids).train[0]
    assert batch.tokens[0, batch.mask[0]].tolist() == tiny.ids(f"a {wanted}")


def test_eval_rows_are_drawn_at_random_from_eval_paths(tmp_path):
    file, held_out = tiny.write(tmp_path / "x.jsonl", pairs(4)), tiny.write(tmp_path / "y.jsonl", pairs(60)[4:])
    first, other = (create(file, "ppo", eval_paths=(held_out,), eval_rows=8, seed=seed) for seed in (0, 1))
    rows = [{tuple(row) for batch in datasets.eval for row in batch.tokens.tolist()} for datasets in (first, other)]
    assert len(rows[0]) == len(rows[1]) == 8
    assert rows[0] != rows[1]


def test_packed_rows_are_as_wide_as_max_tokens(tmp_path):
    """Rows of packed pairs are twice as wide, because they contain both texts of a pair."""
    file = tiny.write(tmp_path / "x.jsonl", pairs(20))
    texts, both = (create(file, phase, packing=True, max_tokens=9) for phase in ("sft", "reward"))
    assert (texts.widths, texts.train[0].tokens.shape[1]) == ((9,), 9)
    assert (both.widths, both.train[0].tokens.shape[1]) == ((18,), 18)


def test_with_prompt_tokens_the_first_tokens_of_a_text_are_the_prompt(tmp_path):
    file = tiny.write(tmp_path / "x.jsonl", [{"text": "a b c d"}, {"text": "e f g"}, {"text": "h"}])
    datasets = create(file, "ppo", prompt_tokens=2)
    assert datasets.widths == (2,)  # all prompts have the same length
    assert sorted(datasets.train[0].tokens.tolist()) == [tiny.ids("a b"), tiny.ids("e f")]
    assert "1 (shorter than prompt_tokens=2)" in datasets.report


def test_the_last_held_out_batch_is_filled_with_empty_rows(tmp_path):
    file, held_out = tiny.write(tmp_path / "x.jsonl", pairs(7)[3:]), tiny.write(tmp_path / "y.jsonl", pairs(3))
    prompts = create(file, "ppo", eval_paths=(held_out,))
    assert (len(prompts.eval), prompts.eval_rows) == (2, 3)
    # The sampler derives random numbers from row ids, so held-out rows have ids far above those of training rows.
    assert prompts.eval[1].row_ids.tolist() == [2**24 + 2, 2**24 + 3]
    for phase, mask in (("sft", "mask"), ("reward", "chosen_mask")):
        last = create(file, phase, eval_paths=(held_out,)).eval[1]
        assert getattr(last, mask).any(axis=1).tolist() == [True, False]


def of_lengths(*lengths):
    """One text without a prompt per length; every token of text i has the id i."""
    return [Example(np.zeros(0, np.int32), (np.full(n, i, np.int32),)) for i, n in enumerate(lengths)]


def test_packed_rows_contain_every_text_once():
    lengths = np.random.RandomState(0).randint(2, 20, 200)
    examples = of_lengths(*lengths)
    rows = packed(examples, 32)
    assert sorted(example.completions[0][0] for row in rows for example in row) == [*range(200)]
    assert max(sum(example.length for example in row) for row in rows) <= 32
    assert len(rows) <= 1.02 * np.ceil(lengths.sum() / 32)
    assert [[example.length for example in row] for row in packed(of_lengths(4, 4, 6, 6), 10)] == [[6, 4], [6, 4]]


def test_packed_pairs_equal_the_unpacked_pairs(tmp_path):
    rows = [pair | {"margin": index} for index, pair in enumerate(pairs(7))]
    file = tiny.write(tmp_path / "x.jsonl", rows)
    datasets = create(file, "reward", packing=True, max_tokens=20, eval_paths=(file,), deduplicate=False)
    apart = create(file, "reward", reward_batch_size=7).train[0]
    texts = {
        float(margin): [tokens[row][mask[row]].tolist() for tokens, mask in sides]
        for row, margin in enumerate(apart.margin)
        for sides in [((apart.chosen, apart.chosen_mask), (apart.rejected, apart.rejected_mask))]
    }
    for batches in ([datasets.train[step] for step in range(datasets.steps_per_epoch)], datasets.eval):
        seen = []
        for batch in batches:
            assert batch.tokens.shape == (2, 40)
            for row, slot in zip(*np.nonzero(batch.real), strict=True):
                for answer, last in enumerate((batch.chosen_last, batch.rejected_last)):
                    own = batch.segments[row] == batch.segments[row, last[row, slot]]
                    own = own & batch.mask[row]
                    assert batch.tokens[row, own].tolist() == texts[float(batch.margin[row, slot])][answer]
                    assert batch.positions[row, own].tolist() == list(range(own.sum()))
                    assert np.flatnonzero(own)[-1] == last[row, slot]
                seen.append(float(batch.margin[row, slot]))
        assert sorted(seen) == list(range(7))


def test_batches_are_padded_to_a_few_widths(tmp_path):
    rows = [
        {"prompt": " ".join(["a"] * length + [text]), "completion": "b"}
        for length in range(1, 28)
        for text in tiny.letters(4)
    ]
    datasets = create(tiny.write(tmp_path / "x.jsonl", rows), "sft", max_tokens=40)
    assert datasets.widths == (10, 20, 40)
    assert {datasets.train[step].tokens.shape[1] for step in range(50)} <= {10, 20, 40}
    datasets = create(tiny.write(tmp_path / "x.jsonl", rows), "sft", max_tokens=40, length_buckets=(30, 50))
    assert {datasets.train[step].tokens.shape[1] for step in range(50)} <= {30, 40}


def test_each_process_gets_its_part_of_a_batch(tmp_path, monkeypatch):
    file = tiny.write(tmp_path / "x.jsonl", pairs(40))
    whole = create(file, "ppo", ppo_batch_size=4)
    parts = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for index in range(2):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        parts.append(create(file, "ppo", ppo_batch_size=4).train[3])
    np.testing.assert_array_equal(np.concatenate([part.tokens for part in parts]), whole.train[3].tokens)
    np.testing.assert_array_equal(np.concatenate([part.row_ids for part in parts]), [0, 1, 2, 3])
    with pytest.raises(ValueError, match="a batch of 3 rows cannot be shared by 2 processes"):
        create(file, "ppo", ppo_batch_size=3)


@pytest.mark.parametrize(
    ("rows", "config", "message"),
    [
        ([{"prompt": "a", "chosen": "", "rejected": "b"}], {}, r"line 1: an empty completion.*on_bad_row=drop"),
        ([{"prompt": "a", "chosen": "b", "rejected": "b"}], {}, "line 1: chosen and rejected are the same"),
        (pairs(3), {"max_tokens": 4}, r"no row is left for the reward phase.*3 \(longer than max_tokens=4\)"),
        (pairs(3), {"reward_batch_size": 4}, "3 rows, fewer than a batch of 4.*--config.data.reward_batch_size=3"),
        (pairs(3), {"data_split": "1,0,1"}, "leaves none of 3 rows to the reward phase"),
        (pairs(3), {"data_split": "1,2"}, "three numbers, for SFT, reward and PPO"),
        (pairs(3), {"weights": (1.0, 2.0)}, "there are 2 weights for 1 paths"),
        (pairs(3), {"max_tokns": 4}, "config.data.max_tokns does not exist; did you mean max_tokens"),
        (pairs(3), {"paths": ()}, "config.data.paths is empty"),
        (pairs(3), {"pad_token": "<nil>"}, "pad_token='<nil>' is not in the tokenizer's vocabulary"),
    ],
)
def test_unusable_rows_and_settings_are_errors(rows, config, message, tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises((DataError, ValueError), match=message):
        create(config.pop("paths", (str(file),)), "reward", **config)


def test_a_missing_pad_token_is_an_error_that_says_what_to_set(tmp_path):
    file = tiny.write(tmp_path / "x.jsonl", pairs(4))
    with pytest.raises(DataError, match=r"no pad token: set --config.data.pad_token='<eos>'"):
        create(file, "ppo", tokenizer=tiny.tokenizer(pad=None))
    assert create(file, "ppo", tokenizer=tiny.tokenizer(pad=None), pad_token="<eos>").train[0].tokens[0, 0] == tiny.EOS
