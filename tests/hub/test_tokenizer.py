"""Tokenizers built from GGUF fields, compared with sentencepiece and with expected tokens, and those of folders."""

import json
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer

from jax_rlhf import CheckpointError
from jax_rlhf.hub.tokenizer import gguf_tokenizer, load_tokenizer
from tests.data.families import FAMILIES, tokenizer_of
from tests.processes import ROOT

FILE = Path("model.gguf")


def byte_level(split, merges=(), tokens=(), **fields):
    """GGUF fields of a byte-level tokenizer: control tokens, all bytes, the results of the merges, and `tokens`."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    pieces = ["<s>", "</s>", *bytes_to_unicode().values(), *("".join(merge) for merge in merges), *tokens]
    return {
        "ggml.model": "gpt2",
        "ggml.pre": split,
        "ggml.tokens": pieces,
        "ggml.token_type": [3, 3] + [1] * (len(pieces) - 2),
        "ggml.merges": [" ".join(merge) for merge in merges],
        "ggml.bos_token_id": 0,
        "ggml.eos_token_id": 1,
        **fields,
    }


def pieces(fields, text):
    tokenizer = gguf_tokenizer(fields, FILE)
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    return tokenizer.convert_ids_to_tokens(ids)


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("smollm", ["a", "ĠĠ", "1", "2", "3", "4"]),  # digits are split first, so both spaces merge
        ("gpt-2", ["a", "Ġ", "Ġ", "12", "34"]),  # the second space belongs to the number, which is not split
        ("qwen2", ["a", "Ġ", "Ġ", "1", "2", "3", "4"]),
        ("llama-bpe", ["<s>", "a", "Ġ", "Ġ", "12", "3", "4"]),  # at most three digits per part, and BOS is added
    ],
)
def test_text_is_split_by_the_pattern_that_the_file_names(split, expected):
    assert pieces(byte_level(split, [("Ġ", "Ġ"), ("1", "2"), ("3", "4")]), "a  1234") == expected


def test_llama3_uses_a_piece_of_the_vocabulary_without_merges():
    merges = [("h", "i")]
    assert pieces(byte_level("llama-bpe", merges, tokens=["hip"]), "hip") == ["<s>", "hip"]
    assert pieces(byte_level("gpt-2", merges, tokens=["hip"]), "hip") == ["hi", "p"]


def test_bos_and_eos_are_added_as_the_file_says():
    both = byte_level("gpt-2", **{"ggml.add_bos_token": True, "ggml.add_eos_token": True})
    assert pieces(both, "x") == ["<s>", "x", "</s>"]
    assert pieces(byte_level("llama-bpe", **{"ggml.add_bos_token": False}), "x") == ["x"]


def test_control_tokens_are_never_split():
    assert pieces(byte_level("gpt-2"), "a b") == ["a", "Ġ", "b"]
    tokenizer = gguf_tokenizer(byte_level("gpt-2"), FILE)
    assert tokenizer.convert_ids_to_tokens(tokenizer("a</s>b").input_ids) == ["a", "</s>", "b"]


def test_a_sentencepiece_vocabulary_gives_the_ids_of_sentencepiece(tmp_path):
    """The tokenizer is trained on this project's README and docs, and compared on each of their lines and on others."""
    lines = [
        line for file in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")] for line in file.read_text().split("\n")
    ]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for line in lines if line.strip()]),
        model_prefix=str(tmp_path / "spm"),
        vocab_size=500,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    theirs = sentencepiece.SentencePieceProcessor(str(tmp_path / "spm.model"))
    ids = range(theirs.get_piece_size())
    kinds = [2 if theirs.is_unknown(i) else 3 if theirs.is_control(i) else 6 if theirs.is_byte(i) else 1 for i in ids]
    fields = {
        "ggml.model": "llama",
        "ggml.tokens": [theirs.id_to_piece(i) for i in ids],
        "ggml.scores": [theirs.get_score(i) for i in ids],
        "ggml.token_type": kinds,
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.unknown_token_id": 0,
    }
    ours = gguf_tokenizer(fields, FILE)
    ours.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    for line in [*lines, "  two", "é 漢字 \t tab", "a", " ", "1234 5"]:
        expected = [1, *theirs.encode(line)]
        if line:  # sentencepiece returns no ids for an empty line
            assert ours(line).input_ids == expected, line
            assert again(line).input_ids == expected, line
            assert ours.decode(expected, skip_special_tokens=True) == line


def test_a_tokenizer_that_cannot_be_read_is_an_error_or_a_warning(tmp_path, caplog):
    assert gguf_tokenizer({}, FILE) is None
    with pytest.raises(CheckpointError, match=r"model\.gguf.*'bert' is not supported; gpt2, llama"):
        gguf_tokenizer({"ggml.model": "bert"}, FILE)
    with pytest.raises(CheckpointError, match=r"model\.gguf: its tokenizer cannot be read: KeyError: 'ggml\.merges'"):
        gguf_tokenizer({"ggml.model": "gpt2", "ggml.tokens": []}, FILE)
    pieces(byte_level("new-and-unheard-of"), "a")
    assert "'new-and-unheard-of' is unknown" in caplog.text
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="its tokenizer cannot be read"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    assert load_tokenizer(tmp_path) is None


def test_a_folders_tokenizer_and_chat_template_are_loaded(tmp_path):
    tokenizer = gguf_tokenizer(byte_level("smollm", chat_template="{{ messages[0]['content'] }}!"), FILE)
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    loaded = load_tokenizer(tmp_path)
    assert loaded("a  12").input_ids == tokenizer("a  12").input_ids
    assert loaded.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"
    assert type(loaded) is type(AutoTokenizer.from_pretrained(tmp_path))


def saved(folder, *, keep=True, **settings):
    """A tokenizer's folder with these settings in tokenizer_config.json; `keep` keeps its tokenizer.json."""
    tokenizer_of(FAMILIES["unigram"]).save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    if not keep:
        (folder / "tokenizer.json").unlink()
    return folder


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"tokenizer_class": "GPT2Tokenizer", "vocab": "{outside}", "merges": "{outside}"},
            "vocab must not be set there",
        ),
        ({"tokenizer_class": "LlamaTokenizer", "vocab": {"a": 1}}, "vocab must not be set there"),
        ({"vocab_file": "{outside}"}, "is in .*; copy it into the folder"),
        ({"tokenizer_file": "{outside}"}, "is in .*; copy it into the folder"),
        ({"tokenizer_class": "T5Tokenizer", "extra_ids": 200_000}, "extra_ids=200000 is not plausible"),
        ({"tokenizer_class": "PegasusTokenizer", "offset": 10**6}, "offset=1000000 is not plausible"),
        ({"tokenizer_class": "ByT5Tokenizer", "extra_ids": -(10**9)}, "extra_ids=-1000000000 is not plausible"),
    ],
)
@pytest.mark.parametrize("keep", [True, False])
def test_settings_that_name_other_files_or_are_implausible_are_errors(tmp_path, settings, said, keep):
    outside = tmp_path / "vocab.json"
    outside.write_text('{"SECRET": 0}')
    filled = {k: v.format(outside=outside) if isinstance(v, str) else v for k, v in settings.items()}
    folder = saved(tmp_path / "model", keep=keep, **filled)
    (folder / "vocab.json").write_text("{}")
    with pytest.raises(CheckpointError, match=said):
        load_tokenizer(folder)


def test_settings_of_published_checkpoints_are_accepted(tmp_path):
    more = {"model_max_length": 10**30, "tokenizer_file": "/somebody/else/tokenizer.json", "pad_token_id": 150_000}
    more |= {"vocab_file": "a" * 3000, "video_token_index": 151_656, "max_length": 512, "stride": 0}
    assert load_tokenizer(saved(tmp_path / "model", **more)) is not None


def test_a_chat_template_may_not_be_a_link_to_another_file(tmp_path):
    """The content of the linked file would be copied with the model."""
    folder = saved(tmp_path / "model")
    (tmp_path / "secret").write_text("PRIVATE KEY")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"chat_template.jinja is in .*; copy it into the folder"):
        load_tokenizer(folder)
    (tmp_path / "link").symlink_to(saved(tmp_path / "other"))
    assert load_tokenizer(tmp_path / "link") is not None  # the folder itself may be a link
