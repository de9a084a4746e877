"""Held-out rows and the phases' shares have no prompt in common, whatever form the prompts have."""

import collections
import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given, settings, strategies as some

from jax_rlhf.config import run_config
from jax_rlhf.data import DataConfig, DataError, create_datasets
from jax_rlhf.data.formats import Texts
from jax_rlhf.data.sources import Row
from jax_rlhf.data.splits import ONE_IN, drawn, grouped, share
from jax_rlhf.data.tokens import first_tokens
from tests.data import tiny

PHASES = ("sft", "reward", "ppo")
SIZES = {f"{phase}_batch_size": 1 for phase in PHASES} | {"max_tokens": 24, "max_prompt_tokens": 12}
SPLITS = {"2,4,4": (0.2, 0.4, 0.4), "1,1,1": (1 / 3, 1 / 3, 1 / 3)}


def create(paths, phase, *, seed=0, eval_rows=None, **config):
    config = {"paths": paths if isinstance(paths, tuple) else (paths,), **SIZES, **config}
    tokenizer = tiny.tokenizer(bos=config.pop("bos", False))
    return create_datasets(config, tokenizer, phase, seed=seed, eval_rows=eval_rows)


def pairs(prompts, each=3, **columns):
    """`each` pairs per prompt; the pairs of one prompt are not adjacent."""
    return [
        {"prompt": text, "chosen": f" {answer}", "rejected": " z"} | columns
        for answer in "abcdefgh"[:each]
        for text in tiny.letters(prompts)
    ]


def chats(rows):
    return [{"messages": [user(row["prompt"]), assistant(row["chosen"])]} for row in rows]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def prompts_of(datasets, tokens=3, before=()):
    """(training, held-out) prompts: of each row, the first `tokens` tokens that follow the tokens `before`."""
    both = []
    for batches in ([datasets.train[step] for step in range(datasets.train_rows)], datasets.eval):
        rows = [batch.chosen if hasattr(batch, "chosen") else batch.tokens for batch in batches]
        real = [batch.chosen_mask if hasattr(batch, "chosen") else batch.mask for batch in batches]
        rows = [
            row[mask].tolist()
            for batch, masks in zip(rows, real, strict=True)
            for row, mask in zip(batch, masks, strict=True)
        ]
        both.append({tuple(row[len(before) :][:tokens]) for row in rows})
    return both


def numbers_of(report):
    read, *parts = (int(number.replace(",", "")) for number in re.findall(r"(?<![=\d])\d[\d,]*(?= [a-z(])", report))
    return read, parts


@pytest.mark.parametrize("seed", range(4))
def test_the_phases_shares_have_no_prompt_in_common(seed, tmp_path):
    file = tiny.write(tmp_path / "x.jsonl", pairs(40))
    found = {}
    for phase in PHASES:
        datasets = create(file, phase, seed=seed, data_split="2,4,4")
        train, held_out = prompts_of(datasets)
        assert not train & held_out
        assert held_out or phase == "sft"  # a tenth of SFT's 8 prompts is less than one
        found[phase] = train | held_out
    assert sorted(map(len, found.values())) == [8, 16, 16]
    assert len(set().union(*found.values())) == 40


@pytest.mark.parametrize("seed", range(4))
def test_no_phase_trains_on_a_prompt_that_another_phase_holds_out(seed, tmp_path):
    file = tiny.write(tmp_path / "x.jsonl", pairs(40))
    both = [prompts_of(create(file, phase, seed=seed, eval_rows=2 if phase == "ppo" else None)) for phase in PHASES]
    assert not set().union(*(train for train, _ in both)) & set().union(*(held_out for _, held_out in both))
    assert [len(held_out) for _, held_out in both] == [4, 4, 2]
    assert [len(train) for train, _ in both] == [36] * 3


@pytest.mark.parametrize("each", [1, 3])
def test_no_more_than_eval_rows_are_held_out(each, tmp_path):
    """All other rows are trained on, although a tenth of the rows is more than eval_rows."""
    file = tiny.write(tmp_path / "x.jsonl", pairs(90 // each, each))
    config = {"paths": (file,), "eval_rows": 6, **SIZES}
    datasets = create_datasets(config, tiny.tokenizer(), "sft", seed=0)
    assert (datasets.train_rows, datasets.eval_rows) == (84, 6)
    assert "more to hold out" not in datasets.report


def test_another_seed_draws_other_held_out_rows_and_shares(tmp_path):
    file = tiny.write(tmp_path / "x.jsonl", pairs(60, 1))
    for config in ({}, {"data_split": "1,1,1"}):
        (train, held_out), (others, other_held_out) = (
            prompts_of(create(file, "sft", seed=seed, **config)) for seed in (0, 1)
        )
        assert len(held_out) == len(other_held_out) > 1
        assert held_out != other_held_out
        if config:  # the shares differ, not only the held-out prompts
            assert (train | held_out) != (others | other_held_out)


class Salted(str):
    """A string with another hash, so that sets iterate in another order, as in another process."""

    def __hash__(self):
        return hash(f"salt {self}")


def test_every_process_draws_the_same_rows():
    rows = [Row(row, "x", 1) for row in pairs(40)]
    source = grouped("x.jsonl", rows, DataConfig(), tiny.tokenizer())
    other = dataclasses.replace(source, groups=[Salted(group) for group in source.groups])
    assert sorted(drawn([source], 12, 0)) == sorted(drawn([other], 12, 0))
    for phase in PHASES:
        mine, others = (share([whole], SPLITS["2,4,4"], phase, 0)[0] for whole in (source, other))
        assert mine.rows == others.rows


def test_a_prompt_in_two_files_belongs_to_one_set(tmp_path):
    one = tiny.write(tmp_path / "one.jsonl", pairs(40, 1))
    other = tiny.write(tmp_path / "other.jsonl", [row | {"chosen": " y"} for row in pairs(60, 2)[10:]])
    for config in ({}, {"data_split": "1,1,1"}):
        both = [prompts_of(create((one, other), phase, **config)) for phase in PHASES]
        held_out = set().union(*(held_out for _, held_out in both))
        assert held_out
        assert not set().union(*(train for train, _ in both)) & held_out
    shares = [train | held_out for train, held_out in both]
    assert sum(map(len, shares)) == len(set().union(*shares)) == 60


def test_prompts_assigned_in_another_file_count_towards_the_share():
    """The second file has ten prompts of SFT's share and twenty new ones, of which each other phase gets ten."""

    def source(name, texts):
        return grouped(name, [Row({"prompt": text}, name, 1) for text in texts], DataConfig(), tiny.tokenizer())

    first = source("one.jsonl", tiny.letters(30))
    (given,) = share([first], SPLITS["1,1,1"], "sft", 0)
    second = source("other.jsonl", [*given.prompts, *tiny.letters(20, start=30)])
    found = [share([first, second], SPLITS["1,1,1"], phase, 0)[1] for phase in PHASES]
    assert [len(part.rows) for part in found] == [10, 10, 10]
    assert set(found[0].prompts) == set(given.prompts)


def test_all_forms_of_one_prompt_are_one_group():
    """The forms are a text, the text with white space around it, a chat, and pairs that begin with it."""
    whole = [user("a"), assistant("b")]
    rows = [
        {"prompt": "a"},
        {"prompt": " a\n", "completion": "b"},
        {"prompt": [user("a")], "completion": [assistant("b")]},
        {"messages": whole},
        {"messages": whole[:1]},
        {"chosen": whole, "rejected": [user("a"), assistant("c")]},
        {"prompt": "a", "chosen": whole, "rejected": [user("a"), assistant("c")]},
        {"chosen": "a b", "rejected": "a c"},
        {"text": "a"},
        {"prompt": "", "chosen": "a", "rejected": "b"},
    ]
    source = grouped("x", [Row(row, "x", 1) for row in rows], DataConfig(), tiny.tokenizer())
    assert set(source.groups) == {"a"}
    longer = [{"messages": [user("a"), assistant("b"), user("c"), assistant("d")]}, {"prompt": [user("a"), user("b")]}]
    source = grouped("x", [Row(row, "x", 1) for row in longer], DataConfig(), tiny.tokenizer())
    assert len({*source.groups, "a"}) == 3


def test_pairs_with_the_same_conversation_as_text_have_one_prompt():
    start = "\n\nHuman: a\n\nAssistant:"
    rows = [{"chosen": f"{start} {one}", "rejected": f"{start} {two}"} for one, two in ("bc", "de", ("b c", "b d"))]
    source = grouped("x", [Row(row, "x", 1) for row in rows], DataConfig(), tiny.tokenizer())
    assert set(source.groups) == {start.strip()}


def test_chats_are_held_out_by_prompt(tmp_path):
    file = tiny.write(tmp_path / "x.jsonl", chats(pairs(40)))
    before = tiny.ids("<user>")
    both = [prompts_of(create(file, phase), before=before) for phase in ("sft", "ppo")]
    assert both[0] == both[1]
    assert [len(part) for part in both[0]] == [36, 4]
    assert not both[0][0] & both[0][1]


def test_rows_of_eval_paths_are_held_out_by_prompt(tmp_path):
    file = tiny.write(tmp_path / "x.jsonl", pairs(20))
    held_out = tiny.write(tmp_path / "y.jsonl", [row | {"chosen": " y"} for row in pairs(5, 1)])
    for phase in PHASES:
        datasets = create(file, phase, eval_paths=(held_out,), eval_rows=2)
        train, held = prompts_of(datasets)
        assert (len(train), len(held)) == (15, 2)  # the other three may be held out by another phase
        assert not train & held
        assert "left out: 15 (held out as well; --config.data.deduplicate=false keeps them)" in datasets.report
    assert create(file, "reward", eval_paths=(held_out,), deduplicate=False).train_rows == 60


def divided(*, phase, split):
    """A reader whose training and held-out rows have prompts in common."""
    del phase
    return pairs(20) if split == "train" else [row | {"chosen": " y"} for row in pairs(5, 1)]


@pytest.mark.parametrize("phase", PHASES)
def test_a_readers_rows_are_held_out_by_prompt(phase):
    train, held_out = prompts_of(create("tests.data.test_splits:divided", phase))
    assert (len(train), len(held_out)) == (15, 5)
    assert not train & held_out


def test_prompts_held_out_of_a_file_are_not_trained_on_from_a_reader(tmp_path):
    file = tiny.write(tmp_path / "x.jsonl", pairs(60))
    paths = "tests.data.test_splits:divided", file
    both = [prompts_of(create(paths, phase)) for phase in PHASES]
    assert not set().union(*(train for train, _ in both)) & set().union(*(held_out for _, held_out in both))
    shares = [set().union(*prompts_of(create(file, phase, data_split="1,1,1"))) for phase in PHASES]
    mixed = [prompts_of(create(paths, phase, data_split="1,1,1"))[0] for phase in PHASES]
    assert all(train <= whole for train, whole in zip(mixed, shares, strict=True))


def given_to(*, phase, split):
    """A reader that returns different rows to each phase."""
    return (
        [{"prompt": text, "chosen": "a", "rejected": "b"} for text in tiny.letters(40 + PHASES.index(phase) * 20)]
        if split == "train"
        else pairs(1, 1)
    )


def test_a_reader_with_rows_per_phase_is_split_into_disjoint_shares():
    found = [
        set().union(
            *prompts_of(create("tests.data.test_splits:given_to", phase, data_split="1,1,1", deduplicate=False))
        )
        - set(map(tuple, [tiny.ids("a a a")]))
        for phase in PHASES
    ]
    assert sum(map(len, found)) == len(set().union(*found))


def test_the_first_tokens_of_a_text_include_bos():
    texts = [
        Texts(text, (), templated, 0.0, {}) for text, templated in (("a b c d", False), ("a c", False), ("b", True))
    ]
    for bos, wanted in ((False, ["a b c", "a c", "b"]), (True, ["<bos> a b", "<bos> a c", "b"])):
        found = first_tokens(texts, tiny.tokenizer(bos=bos), 3)
        assert [opening.tolist() for opening in found] == [tiny.ids(text) for text in wanted]


def test_with_prompt_tokens_texts_are_grouped_by_their_first_tokens(tmp_path):
    """Several texts begin with the same prompt of PPO. SFT does not train on texts whose prompt PPO holds out."""
    rows = [{"text": f"{text} {end}"} for end in ("a b", "c d", "e") for text in tiny.letters(40)]
    file = tiny.write(tmp_path / "x.jsonl", rows)
    texts = create(file, "sft")
    assert (texts.train_rows, texts.eval_rows) == (108, 12)
    for bos in (False, True):
        options = {"prompt_tokens": 3 + bos, "bos": bos}
        before = tiny.ids("<bos>") if bos else ()
        (sft, sft_held), (ppo, ppo_held) = (
            prompts_of(create(file, phase, **options), before=before) for phase in ("sft", "ppo")
        )
        assert (len(ppo), len(ppo_held)) == (36, 4)
        assert (sft, sft_held) == (ppo, ppo_held)
        sft, ppo = (
            set().union(*prompts_of(create(file, phase, data_split="1,0,1", **options), before=before))
            for phase in ("sft", "ppo")
        )
        assert not sft & ppo
        assert len(sft) == len(ppo) == 20


def test_prompts_equal_after_truncation_are_not_trained_on_and_held_out(tmp_path):
    rows = [{"prompt": f"{text} x y", "completion": "b"} for text in tiny.letters(40)]
    file = tiny.write(tmp_path / "x.jsonl", rows)
    datasets = create(file, "ppo", too_long="truncate", max_prompt_tokens=2)
    assert (datasets.train_rows, datasets.eval_rows) == (1, 0)
    assert "left out: 1 (held out, but in tokens equal to a prompt that is trained on)" in datasets.report

    # Held-out rows are left out even if their completions differ from those of the training rows.
    rows = [{"prompt": f"{text} x y", "completion": text} for text in tiny.letters(40)]
    file = tiny.write(tmp_path / "y.jsonl", rows)
    datasets = create(file, "sft", too_long="truncate", max_prompt_tokens=2, max_tokens=6)
    assert (datasets.train_rows, datasets.eval_rows) == (36, 0)


def test_a_readers_held_out_prompts_are_not_trained_on_with_prompt_tokens(tmp_path):
    """Prompts beyond eval_rows are not trained on either, because another phase may evaluate on them."""
    file = tiny.write(tmp_path / "x.jsonl", pairs(40, 1))
    datasets = create(("tests.data.test_splits:divided", file), "sft", prompt_tokens=2, eval_rows=2)
    train, _ = prompts_of(datasets)
    assert not train & {tuple(tiny.ids(text)) for text in tiny.letters(5)}
    assert len(train) > 30


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("form", ["a prompt", "none"])
def test_rows_with_one_prompt_are_not_split_and_rows_without_one_are(phase, form, tmp_path):
    rows = [{"prompt": "a" if form == "a prompt" else "", "chosen": text, "rejected": "z"} for text in tiny.letters(40)]
    file = tiny.write(tmp_path / "x.jsonl", rows)
    if form == "none":
        if phase != "ppo":
            datasets = create(file, phase, data_split="1,1,0")
            assert (datasets.train_rows, datasets.eval_rows) == (18, 2)
        return
    datasets = create(file, phase)
    assert (datasets.train_rows, datasets.eval_rows) == (1 if phase == "ppo" else 40, 0)
    assert "nothing of paths is held out" in datasets.report
    assert create(file, "ppo", data_split="0,0,1").train_rows == 1
    with pytest.raises(DataError, match=r"leaves none of 40 rows to the sft phase \(they have 1 prompts"):
        create(file, "sft", data_split="1,1,2")


@pytest.mark.parametrize("phase", PHASES)
def test_the_counts_in_the_report_add_up(phase, tmp_path):
    rows = [*pairs(60), *pairs(5), {"prompt": " ".join("a" * 30), "chosen": "a", "rejected": "b"}]
    one, other = tiny.write(tmp_path / "x.jsonl", rows), tiny.write(tmp_path / "y.jsonl", pairs(90, 1)[50:])
    named = tiny.write(tmp_path / "z.jsonl", pairs(58, 1)[52:])
    for paths in ((one,), (one, other), (one, "tests.data.test_splits:divided")):
        for config in ({}, {"data_split": "1,2,3"}, {"eval_paths": (named,)}, {"prompt_tokens": 2, "eval_rows": 2}):
            report = create(paths, phase, **({"eval_rows": 5} | config)).report
            read, parts = numbers_of(report)
            assert read == sum(parts), report


def test_all_phases_of_a_run_draw_the_same_number_of_held_out_rows():
    config = run_config({"data": {"eval_rows": 64}, "ppo": {"eval_rows": 8}})
    assert {config.data_of(phase).eval_rows for phase in PHASES} == {64}
    assert [config.eval_rows_of(phase) for phase in PHASES] == [64, 64, 8]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    files=some.lists(some.lists(some.integers(0, 25), min_size=1, max_size=120), min_size=1, max_size=3),
    split=some.sampled_from(sorted(SPLITS)),
    seed=some.integers(0, 3),
)
def test_any_rows_are_split_by_prompt(files, split, seed):
    """The shares cover all rows and are as close to the split as the largest group allows; few rows are held out."""
    tokenizer, config = tiny.tokenizer(), DataConfig()
    rows = [[Row({"prompt": str(prompt)}, "x", n) for n, prompt in enumerate(file)] for file in files]
    sources = [grouped(f"{n}.jsonl", part, config, tokenizer) for n, part in enumerate(rows)]
    shares = [share(sources, SPLITS[split], phase, seed) for phase in PHASES]
    groups = [set().union(*(source.groups for source in part)) for part in shares]
    assert sum(map(len, groups)) == len(set().union(*groups))
    for index, source in enumerate(sources):
        assert sum(len(part[index].rows) for part in shares) == len(source.rows)
    counts = collections.Counter(sources[0].groups)
    wanted = np.asarray(SPLITS[split]) * len(sources[0].rows)
    assert np.all(np.abs([len(part[0].rows) for part in shares] - wanted) <= max(counts.values()) + 1)
    held_out = drawn(sources, 5, seed)
    for source in sources:
        rows = sum(group in held_out for group in source.groups)
        assert rows <= min(5, len(source.rows) // ONE_IN)
        assert len(held_out & set(source.groups)) <= len(set(source.groups)) // ONE_IN
