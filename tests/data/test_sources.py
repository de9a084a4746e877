"""Rows are read from files, readers and data sets, and errors name the file and line."""

import csv
import gzip
import json
import re
from types import SimpleNamespace

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from jax_rlhf.data import DataError, imported
from jax_rlhf.data.sources import read_rows

ROWS = [{"prompt": "a, b", "completion": 'c "d"\ne'}, {"prompt": "f\u2028g", "completion": "h"}]


def read(path):
    return read_rows(str(path), phase="sft", split="train", hub_split="train")


def write_as(suffix, folder):
    file = folder / f"rows{suffix}"
    if suffix == ".jsonl":
        file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS), encoding="utf-8")
    elif suffix == ".json":
        file.write_text(json.dumps(ROWS))
    elif suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    elif suffix == ".arrow":
        table = pyarrow.Table.from_pylist(ROWS)
        with pyarrow.ipc.new_file(file, table.schema) as written:
            written.write_table(table)
    else:
        with file.open("w", newline="", encoding="utf-8") as lines:
            writer = csv.DictWriter(lines, ["prompt", "completion"], delimiter="\t" if suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(ROWS)
    return file


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".arrow", ".csv", ".tsv"])
def test_the_same_rows_are_read_from_every_file_format(suffix, tmp_path):
    file = write_as(suffix, tmp_path)
    assert [row.content for row in read(file)] == ROWS
    if suffix not in (".parquet", ".arrow"):
        packed = file.with_name(f"{file.name}.gz")
        packed.write_bytes(gzip.compress(b"\xef\xbb\xbf" + file.read_bytes()))  # with a byte-order mark
        assert [row.content for row in read(packed)] == ROWS


def test_a_json_file_may_be_lines_an_object_with_rows_or_one_row(tmp_path):
    (tmp_path / "x.json").write_text("\n".join(map(json.dumps, ROWS)))
    assert [row.content for row in read(tmp_path / "x.json")] == ROWS
    (tmp_path / "x.json").write_text(json.dumps({"data": ROWS}))
    assert [row.content for row in read(tmp_path / "x.json")] == ROWS
    (tmp_path / "x.json").write_text(json.dumps(ROWS[0], indent=1))
    assert [row.content for row in read(tmp_path / "x.json")] == ROWS[:1]


def test_values_of_arrows_json_type_are_parsed(tmp_path):
    """`datasets` uses this type for columns whose values have several types."""
    rows = [{"messages": [{"role": "user", "content": "a"}, {"x": 1}], "b": 2}, {"messages": None, "b": "c"}]
    kinds = datasets.Features(messages=datasets.List(datasets.Json()), b=datasets.Json())
    table = datasets.Dataset.from_list(rows, features=kinds)
    table.to_parquet(tmp_path / "x.parquet")
    assert [row.content for row in read(tmp_path / "x.parquet")] == rows
    table.save_to_disk(str(tmp_path / "saved"))
    assert [row.content for row in read(tmp_path / "saved")] == rows


def test_an_error_names_the_parquet_row_that_cannot_be_read(tmp_path):
    """Other programs may store text that is not UTF-8. Here it is in the second batch of rows."""
    texts = pyarrow.array([b"fine"] * 1500 + [b"\xff\xfe"] + [b"fine"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x.parquet, row 1501: a value that cannot be read \(.*UTF8"):
        read(tmp_path / "x.parquet")


@pytest.mark.parametrize("rows", [3, 300_000])
def test_a_broken_stream_from_the_decoding_process_is_an_error(tmp_path, monkeypatch, rows):
    """The rows before the break are not returned, and the reader does not wait for the process."""
    file = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": list(map(str, range(rows)))}), file)
    open_stream = pyarrow.ipc.open_stream

    def breaks(stream):
        yield next(open_stream(stream))
        raise pyarrow.ArrowInvalid("broken")

    monkeypatch.setattr(pyarrow.ipc, "open_stream", breaks)
    with pytest.raises(DataError, match=r"x.parquet: not a parquet file that can be read \((broken|.*pipe.*)\)"):
        read(file)


def test_long_fields_of_csv_files_are_read(tmp_path):
    """By default, Python's csv module rejects fields of more than 131,072 characters."""
    (tmp_path / "x.csv").write_text("text\n" + "a" * 200_000 + "\n")
    assert len(read(tmp_path / "x.csv")[0].content["text"]) == 200_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"a": 1}\n\n{"a": \n', "x.jsonl, line 3: not JSON"),
        ("x.jsonl", '{"a": 1}\n[1]\n', "x.jsonl, line 2: a row must be an object of columns, and is a list"),
        ("x.jsonl", "\n\n", "it has no rows"),
        ("x.jsonl", "[" * 100_000, "line 1: not JSON"),
        ("x.json", '{"a": 1}\n{"a": 2', "x.json, line 2: not JSON"),
        ("x.json", '"text"', "must contain a list of objects"),
        ("x.csv", "a,b\n1,2\n3\n", "x.csv, row 2: the first line names 2 columns"),
        ("x.csv", 'a,b\n"1,2', "not CSV"),
        ("x.parquet", "PAR1", "not a parquet file that can be read .*[Pp]arquet"),
        ("x.arrow", "ARROW1", "not an Arrow file that can be read"),
        ("x.jsonl.gz", "text", "not a whole gzip file"),
        ("x.txt", "a", "must end with one of .jsonl, .json, .csv, .tsv, .parquet, .arrow"),
    ],
)
def test_an_error_about_a_broken_file_names_the_file_and_line(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_an_error_about_text_that_is_not_utf8_names_the_line(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"a": 1}\n{"a": "\xff"}\n')
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        read(tmp_path / "x.jsonl")


def test_an_exception_in_a_reader_is_not_hidden():
    with pytest.raises(TypeError, match=r"has no len\(\)"):
        read_rows("tests.data.tiny:broken", phase="sft", split="train", hub_split="")


def test_a_reader_gets_the_phase_and_the_split():
    rows = read_rows("tests.data.tiny:reader", phase="reward", split="eval", hub_split="")
    assert rows[0].content == {"text": "a a a r e"}
    with pytest.raises(DataError, match="it must return an iterable of dicts"):
        read("tests.data.tiny:no_rows")


def test_a_path_that_does_not_exist_is_an_error(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="is neither an existing file or folder"):
        read(tmp_path / "missing.jsonl")
    with pytest.raises(ValueError, match="cannot be imported"):
        read("tests.data.tiny:nobody")
    with pytest.raises(ValueError, match="not a function"):
        imported("tests.data.tiny:WORDS", "config.x")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="Without a network use a local file"):
        read("nobody/nothing")


# ---- Hugging Face data sets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False])
def test_a_folder_written_by_save_to_disk_is_read(tmp_path, whole):
    train = datasets.Dataset.from_list(ROWS)
    saved = datasets.DatasetDict(train=train, test=train.select([1])) if whole else train
    saved.save_to_disk(str(tmp_path / "saved"))
    assert [row.content for row in read(tmp_path / "saved")] == ROWS
    if whole:
        test = read_rows(str(tmp_path / "saved"), phase="sft", split="eval", hub_split="test")
        assert [row.content for row in test] == ROWS[1:]
        with pytest.raises(DataError, match=r"no split 'dev'; it has .*train.* config.data.split"):
            read_rows(str(tmp_path / "saved"), phase="sft", split="train", hub_split="dev")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("org/name", {"name": None, "data_dir": None}),
        ("openai/gsm8k:main", {"name": "main", "data_dir": None}),
        (
            "Anthropic/hh-rlhf:harmless-base",
            {"name": None, "data_dir": "harmless-base"},
        ),  # a folder, not a configuration
    ],
)
def test_a_path_may_name_a_configuration_or_folder_of_a_data_set(monkeypatch, path, expected):
    asked = []

    def load_dataset(where, name=None, *, data_dir=None, split, revision):
        if name == "harmless-base":
            raise ValueError("BuilderConfig 'harmless-base' not found. Available: ['default']")
        asked.append({"path": where, "name": name, "data_dir": data_dir, "split": split, "revision": revision})
        return ROWS

    def load_dataset_builder(where, **more):
        load_dataset(where, **more, split=None)
        asked.clear()
        own = f"hf://datasets/{where}@abc/data/train.parquet"
        return SimpleNamespace(config=SimpleNamespace(data_files={"train": [own]}))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    rows = read_rows(path, phase="sft", split="train", hub_split="dev", revision="v1")
    assert [row.content for row in rows] == ROWS
    assert asked == [{"path": path.partition(":")[0], "split": "dev", "revision": "v1"} | expected]


def test_a_column_that_cannot_be_decoded_is_an_error(monkeypatch):
    """`datasets` needs extra packages for audio and images, and fails without them when it reads a row."""

    def rows():
        yield ROWS[0]
        raise ImportError("To support decoding audio data, please install 'torchcodec'.")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **options: rows())
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **options: SimpleNamespace(config=None))
    with pytest.raises(DataError, match="'org/name', split 'train': ImportError: To support decoding audio"):
        read("org/name")
    with pytest.raises(ValueError, match=r"cannot be imported.*org/name:configuration"):
        read("gsm8k:main")


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "https://example.org/rows.jsonl", "hf://datasets/org/other@abc/x.jsonl"]
)
def test_a_hub_data_set_cannot_name_files_outside_its_repository(monkeypatch, name):
    builder = SimpleNamespace(
        config=SimpleNamespace(data_files={"train": ["hf://datasets/org/name@abc/x.jsonl", name]})
    )
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **options: builder)
    monkeypatch.setattr(datasets, "load_dataset", None)
    with pytest.raises(DataError, match=f"its card names '{re.escape(name)}', which is not a file of the data set"):
        read("org/name")


def test_an_unavailable_data_set_is_an_error_that_explains_the_path():
    """Tests have no network."""
    with pytest.raises(DataError, match=r"'org/none', split 'train': .* org/name:configuration"):
        read("org/none")
