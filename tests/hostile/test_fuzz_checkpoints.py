"""A malformed file of a model's checkpoint ends in a documented error, or the model loads and can be saved."""

import json
import resource
import struct

import pytest
from hypothesis import strategies as some

from jax_rlhf import CheckpointError, load_pretrained, save_pretrained
from jax_rlhf.data import DataError, create_datasets
from tests.data import tiny as data
from tests.data.families import FAMILIES, tokenizer_of
from tests.hostile.fuzzing import GROWTH, changed, damaged, fuzzed, inputs, json_files, values
from tests.hub import tiny
from tests.hub.test_gguf import write_gguf

CASES = ("llama_yarn", "mistral", "qwen2_window", "qwen3", "gemma2", "gemma3_scaled", "phi3_longrope")
CASES += ("gpt2_options", "pythia", "opt_350m")


def loads(path, seen, *, save=None, use=None):
    """Loads a checkpoint, and if that succeeds, uses and saves it."""
    try:
        pretrained = load_pretrained(path)
    except (CheckpointError, FileNotFoundError) as error:
        seen.add("refused" if str(error) else "without a word")
        return
    seen.add("read")
    if use is not None:
        use(pretrained)
    if save is not None:
        save_pretrained(save, pretrained)


@inputs(500, 10_000)
def test_a_malformed_safetensors_file_is_read_or_refused(examples, tmp_path):
    folder = tiny.write_checkpoint(tmp_path / "model", "llama")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    header, body = json.loads(whole[8 : 8 + size]), whole[8 + size :]
    numbers = some.integers(-1, 2**62) | some.sampled_from([2**40, 2**63, 2**64, -(2**63)])
    entries = some.fixed_dictionaries(
        {
            "dtype": some.sampled_from(["F32", "F16", "BF16", "F64", "I8", "U64", "BOOL", "X"]) | values,
            "shape": some.lists(numbers, max_size=4) | values,
            "data_offsets": some.lists(numbers, min_size=2, max_size=2) | values,
        }
    )
    names = some.sampled_from(sorted(header)) | some.sampled_from(["../../escaped", "/etc/escaped", "a\x00b"])
    seen = set()

    def with_header(changes):
        text = json.dumps(header | changes).encode()
        return struct.pack("<Q", len(text)) + text + body

    def check(content):
        file.write_bytes(content)
        loads(folder, seen)

    contents = damaged(whole) | some.dictionaries(names, entries, min_size=1, max_size=3).map(with_header)
    fuzzed(examples, check, content=contents)
    assert seen == {"read", "refused"}
    assert not list(tmp_path.rglob("*escaped*"))


@pytest.mark.parametrize("case", CASES)
@inputs(60, 2_000)
def test_a_malformed_model_config_is_read_or_refused(examples, case, tmp_path):
    folder = tiny.write_checkpoint(tmp_path / "model", case)
    file, seen = folder / "config.json", set()
    whole = json.loads(file.read_text())
    more = {"id2label": {"0": "A"}, "layer_types": ["full_attention"], "n_layer": 2, "rope_scaling": None}
    named = some.dictionaries(some.sampled_from(sorted(whole | more)), values, min_size=1, max_size=3)

    def check(content):
        file.write_bytes(content)
        loads(folder, seen, save=tmp_path / "saved")

    contents = json_files(whole) | named.map(lambda change: json.dumps(whole | change).encode())
    fuzzed(examples, check, few=60, content=contents)
    assert seen == {"read", "refused"}


@inputs(80, 10_000)
def test_a_malformed_generation_config_or_index_is_read_or_refused(examples, tmp_path):
    folder = tiny.write_checkpoint(tmp_path / "model", "llama")
    generation, index = folder / "generation_config.json", folder / "model.safetensors.index.json"
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    whole = {
        generation: {
            "bos_token_id": 1,
            "eos_token_id": [2, 3],
            "pad_token_id": 0,
            "temperature": 0.7,
            "do_sample": True,
        },
        index: {
            "metadata": {"total_size": 1},
            "weight_map": dict.fromkeys(tiny.tensors("llama"), "model-00001-of-00001.safetensors"),
        },
    }
    seen = set()

    def check(which, change):
        for file, content in whole.items():
            file.write_text(json.dumps(content))
        which.write_bytes(change)
        loads(folder, seen, save=tmp_path / "saved")

    for which, content in whole.items():
        fuzzed(examples, check, few=80, which=some.just(which), change=json_files(content))
        assert seen == {"read", "refused"}
        seen.clear()


@pytest.mark.parametrize("name", ["qwen", "llama2", "unigram"])
@inputs(20, 4_000)
def test_a_malformed_tokenizer_is_refused_or_can_be_used(examples, name, tmp_path):
    """Damages tokenizer.json and tokenizer_config.json. A tokenizer that loads can be used and saved."""
    folder = tiny.write_checkpoint(tmp_path / "model", "llama")
    tokenizer_of(FAMILIES[name]).save_pretrained(folder)
    files = [folder / "tokenizer.json", folder / "tokenizer_config.json"]
    whole = {file: json.loads(file.read_text()) for file in files}

    chat = [{"role": "user", "content": "he </s><|im_end|>"}]
    rows = data.write(tmp_path / "rows.jsonl", [{"prompt": chat, "chosen": "the", "rejected": "he"}] * 2)
    options = {"paths": (rows,), "deduplicate": False, "reward_batch_size": 1}
    seen = set()

    def use(pretrained):
        try:
            create_datasets(options, pretrained.tokenizer, "reward", seed=0)
        except DataError as error:
            seen.add(bool(str(error)))

    def check(which, content):
        for file, other in whole.items():
            file.write_text(json.dumps(other))
        which.write_bytes(content)
        loads(folder, seen, save=tmp_path / "saved", use=use)

    parts = {key: part for key, part in whole[files[0]].items() if key != "model"}  # most of the file is the vocabulary
    near = changed(parts).map(lambda part: json.dumps(whole[files[0]] | part).encode())
    fuzzed(examples, check, few=20, which=some.just(files[0]), content=json_files(whole[files[0]]) | near)
    fuzzed(examples, check, few=20, which=some.just(files[1]), content=json_files(whole[files[1]]))
    assert {"read", "refused"} <= seen <= {"read", "refused", True}


@inputs(500, 10_000)
def test_a_malformed_gguf_file_is_read_or_refused(examples, tmp_path):
    file = tmp_path / "model.gguf"
    write_gguf(file)
    whole, seen = file.read_bytes(), set()

    def check(content):
        file.write_bytes(content)
        loads(file, seen)

    fuzzed(examples, check, content=damaged(whole))
    assert seen == {"read", "refused"}


def test_headers_that_claim_terabytes_are_refused(tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    folder = tiny.write_checkpoint(tmp_path / "model", "llama")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(struct.pack("<Q", 2**43) + whole[8:])  # the header's own size
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_pretrained(folder)
    entry = {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}
    text = json.dumps({"model.embed_tokens.weight": entry}).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 64)
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_pretrained(folder)
    file.write_bytes(whole)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 2**30, "num_hidden_layers": 2**30}))
    with pytest.raises(CheckpointError):
        load_pretrained(folder)
    gguf = tmp_path / "model.gguf"
    write_gguf(gguf)
    content = bytearray(gguf.read_bytes())
    content[8:24] = struct.pack("<QQ", 2**40, 2**40)  # numbers of tensors and of fields
    gguf.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a whole GGUF file"):
        load_pretrained(gguf)
    key = struct.pack("<Q", 1) + b"k"
    for kind in (4, 8, 9):  # 2⁴⁰ numbers, texts, arrays
        field = key + struct.pack("<IIQ", 9, kind, 2**40)
        gguf.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + field + b"\0" * 100)
        with pytest.raises(CheckpointError, match=r"not a whole GGUF file .*claims"):
            load_pretrained(gguf)
    # The file has all 2,000,000 entries. The gguf package would take 200 times their size.
    field = key + struct.pack("<IIQ", 9, 8, 2_000_000)
    gguf.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + field + b"\0" * 16_000_000)
    with pytest.raises(CheckpointError, match="claims 2,000,000 entries; all arrays together may have 1,500,000"):
        load_pretrained(gguf)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < GROWTH
