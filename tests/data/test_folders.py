"""From a data set's folder only the files of the requested split are read, and no files outside the folder."""

import gzip
import json
import time

import datasets
import pytest

from jax_rlhf.data import DataError
from jax_rlhf.data.sources import read_rows
from tests.data import tiny

ROWS = [{"prompt": text, "completion": text} for text in tiny.letters(6)]


def read(folder, split="train"):
    return [row.content for row in read_rows(str(folder), phase="sft", split="train", hub_split=split)]


def with_card(folder, configs):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\nlicense: mit\n---\n# A data set\n")
    return folder


def as_datasets_has_it(folder, split="train", **options):
    loaded = datasets.load_dataset(str(folder), split=split, cache_dir=str(folder.parent / "cache"), **options)
    return list(loaded)


# ---- files that datasets would read --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (("x.jsonl",), ("train",)),
        (("train.jsonl", "test.jsonl"), ("train", "test")),
        (("data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"), ("train", "train[:3]")),
        (("train/b.jsonl", "train/a.jsonl", "test/a.jsonl"), ("train", "test", "train[50%:]+test[:1]")),
        (("my_train.jsonl", "my_validation.jsonl", "notes.txt", ".hidden.jsonl"), ("train", "validation")),
        (("harmless/train.jsonl.gz", "helpful/train.jsonl.gz"), ("train",)),
    ],
)
def test_the_same_rows_are_read_in_the_same_order_as_by_datasets(tmp_path, files, splits):
    for number, name in enumerate(files):
        file = tmp_path / "set" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        content = "".join(json.dumps(row | {"from": number}) + "\n" for row in ROWS).encode()
        file.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    for split in splits:
        assert read(tmp_path / "set", split) == as_datasets_has_it(tmp_path / "set", split)


@pytest.mark.parametrize(
    "configs",
    [
        [{"config_name": "default", "data_files": "a.jsonl"}],
        [{"config_name": "default", "data_files": ["a.jsonl", "sub/*"]}],
        [{"config_name": "default", "data_files": [{"split": "train", "path": "sub/b.jsonl"}]}],
        [
            {"config_name": "one", "data_files": [{"split": "train", "path": ["a.jsonl"]}]},
            {"config_name": "two", "data_files": [{"split": "train", "path": ["sub/b.jsonl"]}], "default": True},
        ],
        [{"config_name": "default", "data_dir": "sub"}],
    ],
)
def test_the_card_selects_the_files_as_in_datasets(tmp_path, configs):
    folder = with_card(tmp_path / "set", configs)
    (folder / "sub").mkdir()
    tiny.write(folder / "a.jsonl", ROWS[:2])
    tiny.write(folder / "sub" / "b.jsonl", ROWS[2:])
    assert read(folder) == as_datasets_has_it(folder)


def test_the_card_sets_the_delimiter_of_csv_files(tmp_path):
    folder = with_card(tmp_path / "set", [{"config_name": "default", "data_files": "a.csv", "sep": ";"}])
    (folder / "a.csv").write_text("prompt;completion\na;b\n")
    assert read(folder) == [{"prompt": "a", "completion": "b"}]
    with_card(folder, [{"config_name": "default", "data_files": "a.csv", "skiprows": 1}])
    with pytest.raises(DataError, match="its card sets skiprows, which is not supported"):
        read(folder)


def test_a_row_is_named_by_its_file_and_line(tmp_path):
    (tmp_path / "set").mkdir()
    tiny.write(tmp_path / "set" / "train.jsonl", ROWS)
    rows = read_rows(str(tmp_path / "set"), phase="sft", split="train", hub_split="train")
    assert rows[2].where == f"{tmp_path / 'set' / 'train.jsonl'}, line 3"


def test_a_missing_file_split_or_configuration_is_an_error(tmp_path):
    (tmp_path / "set").mkdir()
    with pytest.raises(DataError, match="it has no files that can be read"):
        read(tmp_path / "set")
    (tmp_path / "set" / "train.txt").write_text("a")
    with pytest.raises(DataError, match=r"none of the files of 'train' can be read \(train.txt\)"):
        read(tmp_path / "set")
    tiny.write(tmp_path / "set" / "train.jsonl", ROWS)
    with pytest.raises(DataError, match=r"no split 'dev'; it has 'train'.*config.data.split"):
        read(tmp_path / "set", "dev")
    with pytest.raises(DataError, match=r"'a b' is not a split|no split 'a b'"):
        read(tmp_path / "set", "a b")
    with_card(tmp_path / "two", [{"config_name": "a", "data_files": "*"}, {"config_name": "b", "data_files": "*"}])
    with pytest.raises(DataError, match=r"several configurations \(a, b\)"):
        read(tmp_path / "two")


# ---- paths outside the folder --------------------------------------------------------------------------------------

LEADING_OUT = ["../secret.jsonl", "sub/../../secret.jsonl", "{root}/secret.jsonl", "https://example.org/a.jsonl", "~/a"]
LEADING_OUT += ["file://{root}/secret.jsonl", "zip://a::b.zip", "hf://datasets/a/b/c.jsonl", "..", "..\\secret.jsonl"]


FORMS = ("one", "list", "split", "data_dir", "yaml")
NAMED = [(form, name) for form in FORMS for name in [*LEADING_OUT, 7, ["a"], {"a": "b"}]]


@pytest.mark.parametrize(("form", "name"), [*NAMED, ("list", None), ("split", None)])
def test_a_card_cannot_name_files_outside_the_folder(tmp_path, name, form):
    tiny.write(tmp_path / "secret.jsonl", [{"prompt": "secret", "completion": "secret"}])
    name = name.format(root=tmp_path) if isinstance(name, str) else name
    files = {"one": name, "list": ["own.jsonl", name], "split": [{"split": "train", "path": [name]}]}.get(form)
    named = {"data_files": "*.jsonl", "data_dir": name} if form == "data_dir" else {"data_files": files}
    folder = tmp_path / "set"
    if form == "yaml":
        folder.mkdir()
        content = json.dumps({"configs": [{"config_name": "default", "data_files": name}]})
        (folder / ".huggingface.yaml").write_text(content)
    else:
        with_card(folder, [{"config_name": "default", **named}])
    tiny.write(folder / "own.jsonl", ROWS)
    with pytest.raises(DataError) as error:
        read(folder)
    assert "secret" not in str(error.value).replace("secret.jsonl", "")
    if isinstance(name, str):
        assert "its card names" in str(error.value)


def test_links_to_files_outside_the_folder_are_not_followed(tmp_path):
    tiny.write(tmp_path / "secret.jsonl", ROWS)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").symlink_to(tmp_path / "secret.jsonl")
    with pytest.raises(DataError, match=r"is a link to .*secret.jsonl, which is not in the folder"):
        read(tmp_path / "set")
    (tmp_path / "set" / "train.jsonl").unlink()
    (tmp_path / "elsewhere").mkdir()
    tiny.write(tmp_path / "elsewhere" / "train.jsonl", ROWS)
    (tmp_path / "set" / "train").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError):
        read(tmp_path / "set")


def test_a_folder_in_the_hub_cache_is_read(tmp_path):
    """In the Hub cache, a data set's files are links to blobs outside its folder."""
    blobs, snapshot = tmp_path / "datasets--a--b" / "blobs", tmp_path / "datasets--a--b" / "snapshots" / "1a2b"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    tiny.write(blobs / "ffff", ROWS)
    (snapshot / "train.jsonl").symlink_to("../../blobs/ffff")
    assert read(snapshot) == ROWS


def test_archives_are_not_unpacked(tmp_path):
    import zipfile

    (tmp_path / "set").mkdir()
    with zipfile.ZipFile(tmp_path / "set" / "train.zip", "w") as archive:
        archive.writestr("train.jsonl", json.dumps(ROWS[0]))
    with pytest.raises(DataError, match=r"can be read \(train.zip\)"):
        read(tmp_path / "set")
    (tmp_path / "set" / "train.zip").rename(tmp_path / "set" / "train.jsonl")  # datasets goes by content, not by name
    with pytest.raises(DataError, match=r"not UTF-8|not JSON"):
        read(tmp_path / "set")


@pytest.mark.parametrize("name", ["../../outside.arrow", "/etc/passwd", "..", 7, None, "a\x00b"])
def test_a_saved_folder_cannot_name_a_file_outside_it(tmp_path, name):
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "set"))
    state = json.loads((tmp_path / "set" / "state.json").read_text())
    (tmp_path / "set" / "state.json").write_text(json.dumps(state | {"_data_files": [{"filename": name}]}))
    with pytest.raises(DataError, match="must name files in its folder"):
        read(tmp_path / "set")


def test_a_saved_dataset_dict_cannot_name_a_split_outside_it(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "other"))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "dataset_dict.json").write_text(json.dumps({"splits": ["../other"]}))
    with pytest.raises(DataError, match="is not a split"):
        read(tmp_path / "set", "../other")
    (tmp_path / "set" / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
    (tmp_path / "set" / "train").symlink_to(tmp_path / "other")
    with pytest.raises(DataError, match=r"train is a link to .*other, which is not in the folder"):
        read(tmp_path / "set")
    (tmp_path / "set" / "train").unlink()
    (tmp_path / "set" / "train").mkdir()
    (tmp_path / "set" / "train" / "state.json").symlink_to(tmp_path / "other" / "state.json")
    with pytest.raises(DataError, match=r"state.json is a link to"):
        read(tmp_path / "set")


@pytest.mark.parametrize("files", [5, "x", {"a": 1}, None, [7], [None], True])
def test_a_saved_folder_with_an_invalid_list_of_files_is_an_error(tmp_path, files):
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "set"))
    state = json.loads((tmp_path / "set" / "state.json").read_text())
    (tmp_path / "set" / "state.json").write_text(json.dumps(state | {"_data_files": files}))
    with pytest.raises(DataError, match="must name files in its folder"):
        read(tmp_path / "set")


@pytest.mark.parametrize("secret", ["snapshots/secret.jsonl", "datasets--a--b/secret.jsonl", "a/blobs/ffff"])
def test_links_are_not_followed_in_a_folder_that_imitates_the_hub_cache(tmp_path, secret):
    """The author of an archive can give its folders the names of the Hub cache."""
    name, _, file = secret.partition("/")
    folder = tmp_path / name / "snapshots" / "1a2b"
    folder.mkdir(parents=True)
    (tmp_path / secret).parent.mkdir(exist_ok=True)
    tiny.write(tmp_path / secret, ROWS)
    (folder / "train.jsonl").symlink_to(f"../../{file}")
    with pytest.raises(DataError, match="is a link to"):
        read(folder)


def test_of_several_formats_the_one_with_the_most_files_is_read(tmp_path):
    """`datasets` chooses in the same way."""
    for name in ("train-1.jsonl", "train-2.jsonl"):
        (tmp_path / "set").mkdir(exist_ok=True)
        tiny.write(tmp_path / "set" / name, ROWS)
    (tmp_path / "set" / "train-0.csv").write_text("prompt,completion\na,b\n")
    assert read(tmp_path / "set") == 2 * ROWS


@pytest.mark.parametrize("pattern", ["*a*a*a*a*a*a*a*a*a*a*a*a*a*b.jsonl", "x/**a**a/*.jsonl", "a" * 2000])
def test_a_pattern_that_is_too_long_or_too_slow_is_refused(tmp_path, pattern):
    folder = with_card(tmp_path / "set", [{"config_name": "default", "data_files": pattern}])
    tiny.write(folder / f"{'a' * 120}.jsonl", ROWS)
    started = time.monotonic()
    with pytest.raises(DataError, match="its card names"):
        read(folder)
    assert time.monotonic() - started < 5


def test_nested_yaml_aliases_in_a_configuration_name_are_not_expanded(tmp_path):
    lines = ["a0: &a0 [x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40))]
    card = "\n".join([*lines, "configs:", "- config_name: *a39", "  data_files: a", "- config_name: b"])
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "README.md").write_text(f"---\n{card}\n---\n")
    with pytest.raises(DataError, match=r"several configurations \(one without a name, b\)"):
        read(tmp_path / "set")


def test_nested_yaml_aliases_in_data_files_are_not_expanded(tmp_path):
    """One kilobyte of YAML can expand to billions of entries."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    (tmp_path / "set").mkdir()
    card = "\n".join([*lines, "configs:", "- config_name: default", "  data_files: *a11"])
    (tmp_path / "set" / "README.md").write_text(f"---\n{card}\n---\n")
    tiny.write(tmp_path / "set" / "train.jsonl", ROWS)
    with pytest.raises(DataError, match="data_files must be patterns"):
        read(tmp_path / "set")
