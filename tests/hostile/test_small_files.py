"""Small files that expand to gigabytes are refused before they take the memory."""

import gzip
import json
import struct
import subprocess
import sys
import time

import datasets
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from jax_rlhf import CheckpointError, load_pretrained
from jax_rlhf.data import DataError, create_datasets, decode_arrow
from jax_rlhf.data.sources import read_rows
from jax_rlhf.hub.tokenizer import gguf_tokenizer, load_tokenizer
from tests.data import tiny as data
from tests.hub import tiny
from tests.memory import growth

MOST = 300_000_000
"""Bytes that a call may take: for a late import, for 64 MiB of rows, and for what is made of them."""
SECONDS = 20
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "pythia", "opt")


def assert_refused(call, error, match):
    def refused():
        with pytest.raises(error, match=match):
            call()

    started = time.monotonic()
    assert growth(refused) < MOST
    assert time.monotonic() - started < SECONDS


# ---- checkpoints ---------------------------------------------------------------------------------------------------

HUGE = {
    "num_labels": 10**9,
    "num_hidden_layers": 10**9,
    "n_layer": 10**9,
    "layer_types": ["full_attention"] * 20_000,
    "id2label": {str(number): "a" for number in range(20_000)},
    "vocab_size": 10**12,
    "hidden_size": 2**40,
    "head_dim": 10**9,
    "num_attention_heads": 10**9,
    "max_position_embeddings": 10**30,
    "sliding_window": -(10**30),
    "made_up": [[10**30]],
}


@pytest.mark.parametrize("case", FAMILIES)
def test_a_config_with_impossible_sizes_is_refused(tmp_path, case):
    folder = tiny.write_checkpoint(tmp_path / "model", case)
    whole = json.loads((folder / "config.json").read_text())
    for name, value in HUGE.items():
        (folder / "config.json").write_text(json.dumps(whole | {name: value}))
        assert_refused(lambda: load_pretrained(folder), CheckpointError, name)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_oversized_json_files_of_a_checkpoint_are_refused(tmp_path, name):
    folder = tiny.write_checkpoint(tmp_path / "model", "llama")
    if name.startswith("model"):
        (folder / "model.safetensors").unlink()
    (folder / name).write_text('{"a": [' + "[]," * 10_000_000 + "[]]}")
    assert_refused(lambda: load_pretrained(folder), CheckpointError, f"{name}: .*it has more than 16,777,216 bytes")
    (folder / name).write_text('{"a": ' * 100 + "1" + "}" * 100)
    assert_refused(lambda: load_pretrained(folder), CheckpointError, f"{name}: .*nested more than 64 deep")
    (folder / name).write_text("[" * 1_000_000)
    assert_refused(lambda: load_pretrained(folder), CheckpointError, f"{name}: .*not JSON")


def test_a_vocabulary_with_a_gap_of_billions_of_ids_is_refused(tmp_path):
    folder = tiny.write_checkpoint(tmp_path / "model", "llama")
    model = {"type": "WordLevel", "vocab": {"a": 0, "b": 2**32 - 1}, "unk_token": "a"}
    content = dict.fromkeys(["truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"])
    file = {"version": "1.0", "added_tokens": [], "model": model, **content}
    (folder / "tokenizer.json").write_text(json.dumps(file))
    assert_refused(lambda: load_tokenizer(folder), CheckpointError, "its largest id is 4294967295")


def test_a_token_of_a_million_characters_is_refused(tmp_path):
    """transformers would try a million ways to split such a token in two."""
    fields = {"ggml.model": "llama", "ggml.tokens": ["<unk>", "a", "a" * 1_000_000], "ggml.scores": [0.0, -1.0, -2.0]}
    assert_refused(lambda: gguf_tokenizer(fields, tmp_path / "x.gguf"), CheckpointError, "has 1,000,000 characters")
    many = [f"{'a' * 1000}{number}" for number in range(21_000)]
    fields |= {"ggml.tokens": many, "ggml.scores": [-1.0] * len(many)}
    assert_refused(lambda: gguf_tokenizer(fields, tmp_path / "x.gguf"), CheckpointError, "its tokens have 21,")
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "a" * 1_000_000: 1}))
    assert_refused(
        lambda: load_tokenizer(tmp_path), CheckpointError, r"vocab.json: the token 'a.* 1,000,000 characters"
    )
    (tmp_path / "vocab.json").unlink()
    piece = b"\x0a\xc0\x84\x3d" + b"a" * 1_000_000  # SentencePiece.piece
    entry = b"\x0a" + b"\xc4\x84\x3d" + piece  # ModelProto.pieces
    (tmp_path / "tokenizer.model").write_bytes(entry)
    assert_refused(lambda: load_tokenizer(tmp_path), CheckpointError, "tokenizer.model: a token is too long")
    (tmp_path / "tokenizer.model").write_bytes(entry[:100])
    assert_refused(lambda: load_tokenizer(tmp_path), CheckpointError, "not a whole sentencepiece model")


@pytest.mark.parametrize("what", ["fields", "tensors"])
def test_a_gguf_file_with_too_many_fields_or_tensors_is_refused(tmp_path, what):
    def text(value):
        return struct.pack("<Q", len(value)) + value

    one = text(b"a") + struct.pack("<IB", 0, 1) if what == "fields" else text(b"a") + struct.pack("<IQIQ", 1, 0, 0, 0)
    counts = (0, 20_000) if what == "fields" else (20_000, 0)
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts) + one * 20_000)
    assert_refused(lambda: load_pretrained(tmp_path / "x.gguf"), CheckpointError, r"20,000 .*are supported")


# ---- data ----------------------------------------------------------------------------------------------------------

LONG = "x" * 1_000_000


def repeated():
    """The same text of a million characters in each of a hundred thousand rows."""
    return pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 100_000, pyarrow.int32()), pyarrow.array([LONG]))


COLUMNS = {
    "dictionary": (repeated, {}),
    "dictionary within lists": (lambda: pyarrow.ListArray.from_arrays([0, 100_000], repeated()), {}),
    "dictionary of the file": (lambda: pyarrow.array([LONG] * 100), {"use_dictionary": True}),
    "compressed": (lambda: pyarrow.array(["x" * 100_000_000]), {"use_dictionary": False}),
    "beginnings": (
        lambda: pyarrow.array([f"{LONG}{number}" for number in range(100)]),
        {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}},
    ),
    "nulls": (lambda: pyarrow.nulls(10_000_000), {}),
    "numbers": (lambda: pyarrow.array([7] * 10_000_000), {}),
    "lists of nulls": (lambda: pyarrow.array([[None] * 5_000_000] * 3, pyarrow.list_(pyarrow.null())), {}),
}
PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@pytest.mark.parametrize("name", COLUMNS)
def test_a_parquet_file_that_expands_to_gigabytes_is_refused(tmp_path, name):
    column, options = COLUMNS[name]
    file = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": column()}), file, compression="zstd", **options)
    assert file.stat().st_size < 100_000
    assert_refused(lambda: read(file), DataError, r"x.parquet: its [\d,]+ bytes expand to more than")
    program = [sys.executable, "-P", decode_arrow.__file__, "parquet", str(file), str(2**26), "1000"]
    done = subprocess.run([sys.executable, "-c", PEAK, *program], capture_output=True, check=True)
    assert int(done.stdout) * 1024 < 1_200_000_000  # peak memory of the process that decodes the file
    (tmp_path / "set").mkdir()
    file.rename(tmp_path / "set" / "train.parquet")
    assert_refused(lambda: read(tmp_path / "set"), DataError, r"train.parquet: its [\d,]+ bytes expand to more than")


ARROW = {
    "dictionary": repeated,
    "compressed": COLUMNS["compressed"][0],
    "dictionary of a list": lambda: pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * 1000, pyarrow.int32()), pyarrow.array([[None] * 400_000], pyarrow.list_(pyarrow.null()))
    ),
    "JSON": lambda: pyarrow.array(["[" + "[]," * 300_000 + "1]"] * 20, pyarrow.json_()),
}


@pytest.mark.parametrize("name", ARROW)
@pytest.mark.parametrize("form", [pyarrow.ipc.new_file, pyarrow.ipc.new_stream])
def test_an_arrow_file_that_expands_to_gigabytes_is_refused(tmp_path, name, form):
    column = ARROW[name]
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "set"))
    (file,) = (tmp_path / "set").glob("*.arrow")
    table = pyarrow.table({"text": column()})
    with form(file, table.schema, options=pyarrow.ipc.IpcWriteOptions(compression="zstd")) as written:
        written.write_table(table)
    assert file.stat().st_size < 100_000
    assert_refused(lambda: read(tmp_path / "set"), DataError, r"arrow: its [\d,]+ bytes expand to more than")


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_a_gzip_file_that_expands_too_far_is_refused(tmp_path, suffix):
    file = tmp_path / f"x{suffix}.gz"
    line = b'{"text": "a"}\n' if suffix == ".jsonl" else b"text\n"
    file.write_bytes(gzip.compress(line * 10 + b" " * 200_000_000 + line))
    assert_refused(lambda: read(file), DataError, "gz: its .* bytes expand to more than|more than 67,108,864 bytes")


@pytest.mark.parametrize(
    ("suffix", "begin", "piece", "end"),
    [
        (".jsonl", b"", b"{}\n", b""),
        (".json", b"[{}", b",{}", b"]"),
        (".jsonl", b'{"text":[[]', b",[]", b"]}\n"),
        (".csv", b"text\n", b"1\n", b""),
    ],
)
def test_a_small_file_that_expands_to_many_values_is_refused(tmp_path, suffix, begin, piece, end):
    """As Python objects, many small values take far more memory than their text."""
    file = tmp_path / f"x{suffix}.gz"
    file.write_bytes(gzip.compress(begin + piece * 2_000_000 + end))
    assert file.stat().st_size < 20_000
    assert_refused(lambda: read(file), DataError, r"gz: its [\d,]+ bytes expand to more than")


@pytest.mark.parametrize("suffix", [".csv", ".arrow"])
def test_a_row_whose_texts_are_too_long_together_is_refused(tmp_path, suffix):
    """Neither text is too long by itself."""
    long, (folder, row) = "a" * 40_000_000, (tmp_path / "set", 2)
    if suffix == ".csv":
        folder.mkdir()
        (folder / "x.csv").write_text(f"text,more\na,b\n{long},{long}\n")
    else:
        rows = {"text": ["a", long], "more": ["b", long]}
        datasets.Dataset.from_dict(rows).save_to_disk(str(folder))
    with pytest.raises(DataError, match=f"row {row}: .*it has more than 67,108,864"):
        read(folder)


def test_a_parquet_file_is_read_in_a_process_with_much_mapped_memory(tmp_path, monkeypatch):
    """Libraries map memory per core. It does not count against the limit of a file."""
    (tmp_path / "sitecustomize.py").write_text("import mmap\n\nkept = mmap.mmap(-1, 3 * 2**30)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"]}), tmp_path / "x.parquet")
    assert [row.content["text"] for row in read(tmp_path / "x.parquet")] == ["a", "b"]


def test_large_files_of_long_texts_are_read(tmp_path):
    """The files have a thousand rows of ten kilobytes, which compress well, and one row of ten megabytes."""
    rows = [f"{'word ' * 2000}{number}" for number in range(1000)] + ["w" * 10_000_000]
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "x.parquet", compression="zstd")
    assert [row.content["text"] for row in read(tmp_path / "x.parquet")] == rows
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps({"text": r}) + "\n" for r in rows).encode()))
    assert [row.content["text"] for row in read(tmp_path / "x.jsonl.gz")] == rows


def read(path):
    return read_rows(str(path), phase="sft", split="train", hub_split="train")


@pytest.mark.parametrize("too_long", ["filter", "truncate"])
@pytest.mark.parametrize("phase", ["sft", "reward", "ppo"])
def test_a_row_of_fifty_megabytes_takes_less_than_ten_times_its_size(tmp_path, phase, too_long):
    long = "a b " * 12_500_000
    row = {"prompt": "c d", "chosen": "e", "rejected": "f"} | {"prompt" if phase == "ppo" else "chosen": long}
    file = data.write(tmp_path / "x.jsonl", [row, {"prompt": "g", "chosen": "h", "rejected": "i"}])
    del row
    config = {
        "paths": (file,),
        "too_long": too_long,
        "max_tokens": 8,
        "max_prompt_tokens": 4,
        f"{phase}_batch_size": 1,
    }
    made = []
    taken = growth(lambda: made.append(create_datasets(config, data.tokenizer(), phase, seed=0)))
    assert taken < 10 * len(long)
    assert made[0].train_rows == (1 if too_long == "filter" else 2)


def test_a_row_of_more_than_64_mib_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "a"}\n{"text": "' + b"a" * 80_000_000 + b'"}\n')
    assert_refused(lambda: read(tmp_path / "x.jsonl"), DataError, "line 2: it has more than 67,108,864 bytes")
    (tmp_path / "x.json").write_bytes(b'[{"text": "a"}, {"text": "' + b"a" * 80_000_000 + b'"}]')
    with pytest.raises(DataError, match="row 2: it has more than 67,108,864 characters"):
        read(tmp_path / "x.json")
