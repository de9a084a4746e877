"""Malformed rows, files and folders of data end in a documented error that names their path."""

import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
from hypothesis import strategies as some

from jax_rlhf.data import DataError, create_datasets
from jax_rlhf.data.sources import read_rows
from tests.data import tiny as data
from tests.data.families import FAMILIES, tokenizer_of
from tests.hostile.fuzzing import as_json, changed, damaged, fuzzed, inputs, json_files, values

PHASES = ("sft", "reward", "ppo")
ROW = b'{"prompt": "a b", "chosen": [{"role": "assistant", "content": "c d"}], "rejected": "e", "margin": 1.5}\n'


def reads(path, phase, tokenizer, seen):
    """Reads rows and makes a batch of them."""
    try:
        for row in read_rows(str(path), phase=phase, split="train", hub_split="train"):
            assert isinstance(row.content, dict)
        options = {"paths": (str(path),), "sft_batch_size": 1, "reward_batch_size": 1, "ppo_batch_size": 1}
        create_datasets(options, tokenizer, phase, seed=0).train[0]
        seen.add("read")
    except DataError as error:
        seen.add("refused" if str(path) in str(error) else str(error))


@inputs(300, 10_000)
def test_a_malformed_jsonl_file_is_read_or_refused(examples, tmp_path):
    file, tokenizer = tmp_path / "rows.jsonl", data.tokenizer()
    names = some.sampled_from(["prompt", "completion", "chosen", "rejected", "messages", "text", "label", "margin"])
    rows = some.dictionaries(names | some.text(max_size=4), values, max_size=5)
    lines = some.lists(rows.map(as_json), max_size=4).map(b"\n".join)
    seen = set()

    def check(content, phase):
        file.write_bytes(content)
        reads(file, phase, tokenizer, seen)

    contents = damaged(ROW * 3) | lines | some.binary(max_size=200) | some.just(b"[" * 100_000)
    for phase in PHASES:
        check(ROW * 3, phase)
    assert seen == {"read"}  # the undamaged rows are valid in each phase
    fuzzed(examples, check, few=300, content=contents, phase=some.sampled_from(PHASES))
    assert seen == {"read", "refused"}


CHATS = {
    "messages": [
        {"role": "system", "content": "he"},
        {"role": "user", "content": [{"type": "text", "text": "the"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]},
        {"role": "tool", "name": "f", "content": "7"},
        {"role": "assistant", "content": "he", "reasoning_content": "the"},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "chat_template_kwargs": {"enable_thinking": True},
    "margin": 1,
    "label": True,
}
SHARE_GPT = {"conversations": [{"from": "human", "value": "he"}, {"from": "gpt", "value": "the"}], "system": "he"}


@inputs(300, 10_000)
def test_malformed_chats_are_read_or_refused(examples, tmp_path):
    """In rows of chats, up to three values are replaced, removed, added, wrapped or nested."""
    file, tokenizer, seen = tmp_path / "rows.jsonl", tokenizer_of(FAMILIES["qwen"]), set()

    def check(row, phase):
        file.write_bytes(as_json(row) + b"\n")
        reads(file, phase, tokenizer, seen)

    pair = {"prompt": CHATS["messages"][:2], "chosen": CHATS["messages"][4:], "rejected": [CHATS["messages"][2]]}
    rows = changed(CHATS) | changed(SHARE_GPT) | changed(pair) | changed(pair | CHATS)
    fuzzed(examples, check, few=300, row=rows, phase=some.sampled_from(PHASES))
    assert seen == {"read", "refused"}


@inputs(150, 5_000)
def test_malformed_json_and_csv_files_are_read_or_refused(examples, tmp_path):
    tokenizer, seen = data.tokenizer(), set()
    row = json.loads(ROW) | {"margin": 1}

    def check(name, content, packed):
        file = tmp_path / (f"{name}.gz" if packed else name)
        file.write_bytes(gzip.compress(content) if packed == "whole" else content)
        reads(file, "sft", tokenizer, seen)

    ways = some.sampled_from(["", "", "whole", "not"])
    fuzzed(examples, check, few=150, name=some.just("x.json"), content=json_files([row, row]), packed=ways)
    assert seen == {"read", "refused"}
    seen.clear()
    table = b'prompt,completion,margin\n"a, b",c,1\n"d ""e""\n",f,2\n'
    content = damaged(table) | some.binary(max_size=100).map(lambda more: table + more)
    for suffix in (".csv", ".tsv"):
        fuzzed(examples, check, few=150, name=some.just(f"x{suffix}"), content=content, packed=ways)
    assert seen == {"read", "refused"}


@inputs(12, 1_500)
def test_malformed_parquet_and_arrow_files_are_read_or_refused(examples, tmp_path):
    """A separate process decodes each file, and may crash."""
    tokenizer, seen = data.tokenizer(), set()
    rows = [json.loads(ROW) | {"more": {"a": [1, None], "b": b"\xff"}}] * 3
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pyarrow.ipc.new_stream(tmp_path / "x.arrow", table.schema) as stream:
        stream.write_table(table)
    whole = {name: (tmp_path / name).read_bytes() for name in ("x.parquet", "x.arrow")}

    def check(name, content):
        (tmp_path / name).write_bytes(content)
        reads(tmp_path / name, "reward", tokenizer, seen)

    for name, content in whole.items():
        check(name, content)
        assert seen == {"read"}
        from_the_end = damaged(content[::-1]).map(
            lambda backwards: backwards[::-1]
        )  # parquet has its metadata at the end
        fuzzed(examples, check, few=12, name=some.just(name), content=damaged(content) | from_the_end)
        assert seen <= {"read", "refused"}
        seen.clear()


@inputs(100, 5_000)
def test_a_malformed_data_set_folder_reads_no_file_outside_it(examples, tmp_path):
    """Changes the data set's card, the names of its files, and the files that save_to_disk wrote."""
    tokenizer, seen = data.tokenizer(template=None), set()
    secret = data.write(tmp_path / "secret.jsonl", [{"text": "z z z z"}] * 3)
    folder, saved = tmp_path / "set", tmp_path / "saved"
    folder.mkdir()
    data.write(folder / "train.jsonl", [{"text": "a b"}] * 3)
    datasets.Dataset.from_list([{"text": "a b"}] * 3).save_to_disk(str(saved))
    card = {"configs": [{"config_name": "default", "data_files": [{"split": "train", "path": ["train.jsonl"]}]}]}
    outside = [
        secret,
        "../secret.jsonl",
        f"file://{secret}",
        "..",
        "../*",
        "**/../../secret.jsonl",
        "~",
        "https://x.org/a",
    ]
    state = json.loads((saved / "state.json").read_text())

    def check_card(content, name):
        for other in ("README.md", ".huggingface.yaml"):
            (folder / other).unlink(missing_ok=True)
        (folder / name).write_bytes(b"---\n" + content + b"\n---\n" if name == "README.md" else content)
        reads(folder, "sft", tokenizer, seen)
        assert not any("z z z z" in one for one in seen)

    def check_state(content, name):
        (saved / name).write_bytes(content)
        reads(saved, "sft", tokenizer, seen)

    paths = some.sampled_from([*outside, "train.jsonl", "*", "**", "[", "train[.jsonl", "{a,b}", "", "."])
    forms = [lambda path: {"configs": [{"config_name": "a", "data_files": path}]}]
    forms += [lambda path: {"configs": [{"config_name": "a", "data_files": [path, "*"]}]}]
    forms += [lambda path: {"configs": [{"config_name": "a", "data_dir": path}]}]
    named = some.tuples(some.sampled_from(forms), paths).map(lambda both: as_json(both[0](both[1])))
    cards = named | changed(card).map(as_json) | damaged(as_json(card))
    fuzzed(examples, check_card, few=100, content=cards, name=some.sampled_from(["README.md", ".huggingface.yaml"]))
    assert seen == {"read", "refused"}
    seen.clear()
    few = some.sampled_from([b'{"splits": ["train"]}', b'{"splits": [".."]}', b"null", b"[]", b"{}"])
    fuzzed(examples // 4, check_state, few=25, content=json_files(state), name=some.just("state.json"))
    fuzzed(examples // 4, check_state, few=25, content=few, name=some.just("dataset_dict.json"))
    assert "refused" in seen
    assert seen <= {"read", "refused"}
