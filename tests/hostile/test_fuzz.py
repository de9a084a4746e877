"""Malformed input ends in a documented error: no other exception, no hang, no blow-up of memory."""

import json
import resource
import struct

import pytest
from absl import flags as absl_flags
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from ml_collections import config_flags

from jax_rlhf import CheckpointError, load_pretrained
from jax_rlhf.data import DataError, create_datasets
from jax_rlhf.data.sources import read_rows
from jax_rlhf.phases import default_config, run_config
from tests.data import tiny as data
from tests.hub import tiny
from tests.hub.test_gguf import write_gguf

SECONDS = 20  # far above what an input takes; a hang is what fails
GROWTH = (
    400_000_000  # bytes that one input may add to the most that the process had; a whole model's first load: 200 MB
)

many = pytest.mark.parametrize("examples", [500, pytest.param(10_000, marks=pytest.mark.slow)])


def fuzzed(examples, check, **strategies):
    """Runs the check on so many inputs, the same ones each time."""

    def measured(**inputs):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        check(**inputs)
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < GROWTH

    how = settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=SECONDS * 1000,
        suppress_health_check=list(HealthCheck),
    )
    how(given(**strategies)(measured))()


@some.composite
def damaged(draw, whole):
    """Bytes with some changed, taken out, put in, doubled or cut off."""
    content = bytearray(whole)
    for _ in range(draw(some.integers(1, 4))):
        place = draw(some.integers(0, min(len(content), 4096)) | some.integers(0, len(content)))  # headers come first
        piece = draw(some.binary(min_size=1, max_size=9) | some.sampled_from(NUMBERS))
        match draw(some.sampled_from(["change", "remove", "insert", "double", "cut"])):
            case "change":
                content[place : place + len(piece)] = piece
            case "remove":
                del content[place : place + len(piece)]
            case "insert":
                content[place:place] = piece
            case "double":
                content[place:place] = content[place : place + draw(some.integers(1, 64))]
            case "cut":
                del content[place:]
    return bytes(content)


NUMBERS = [struct.pack("<Q", n) for n in (0, 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)]

values = some.recursive(
    some.none()
    | some.booleans()
    | some.integers(-(2**70), 2**70)
    | some.floats()
    | some.text(max_size=8)
    | some.sampled_from(["None", "a,b", "1e9999", "../../etc/passwd", "\x1b[31m", "\ud800", "__import__('os')"]),
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(some.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


# ---- JSONL ---------------------------------------------------------------------------------------------------------

PHASES = ("sft", "reward", "ppo")
ROW = b'{"prompt": "a b", "chosen": [{"role": "assistant", "content": "c d"}], "rejected": "e", "margin": 1.5}\n'


@many
def test_jsonl(examples, tmp_path):
    file, tokenizer = tmp_path / "rows.jsonl", data.tokenizer()
    names = some.sampled_from(["prompt", "completion", "chosen", "rejected", "messages", "text", "label", "margin"])
    rows = some.dictionaries(names | some.text(max_size=4), values, max_size=5)
    lines = some.lists(rows.map(lambda row: json.dumps(row).encode()), max_size=4).map(b"\n".join)
    seen = set()

    def check(content, phase):
        file.write_bytes(content)
        try:
            for row in read_rows(str(file), phase=phase, split="train", hub_split="train"):
                assert isinstance(row.content, dict)
            how = {"paths": (str(file),), "sft_batch_size": 1, "reward_batch_size": 1, "ppo_batch_size": 1}
            create_datasets(how, tokenizer, phase, seed=0).train[0]
            seen.add("read")
        except DataError as error:
            seen.add("refused" if str(file) in str(error) else str(error))

    contents = damaged(ROW * 3) | lines | some.binary(max_size=200) | some.just(b"[" * 100_000)
    for phase in PHASES:
        check(ROW * 3, phase)
    assert seen == {"read"}  # what the damaged files are made of is right in each phase
    fuzzed(examples, check, content=contents, phase=some.sampled_from(PHASES))
    assert seen == {"read", "refused"}


# ---- the config ----------------------------------------------------------------------------------------------------


def paths(config, prefix=""):
    for name, value in config.items():
        yield from paths(value, f"{prefix}{name}.") if hasattr(value, "items") else [f"{prefix}{name}"]


@many
def test_config_overrides(examples):
    known = sorted(paths(default_config()))
    seen = set()

    def flags_of(overrides):
        """As `--config.name=value` has it."""
        flag_values = absl_flags.FlagValues()
        config_flags.DEFINE_config_dict("config", default_config(), flag_values=flag_values)
        flag_values(["program", *(f"--config.{name}={value}" for name, value in overrides)])
        return flag_values.config

    def nested(overrides):
        config = default_config().to_dict()
        for name, value in overrides:
            *sections, last = name.split(".")
            target = config
            for section in sections:
                target = target.get(section) if isinstance(target, dict) else None
            if isinstance(target, dict):
                target[last] = value
        return config

    def check(overrides, as_flags):
        try:
            run_config(flags_of(overrides) if as_flags else nested(overrides))
            seen.add("read")
        except ValueError as error:
            seen.add("refused" if str(error) else "without a word")
        except (absl_flags.Error, AttributeError, KeyError, TypeError, SyntaxError):  # `parse_flags` explains them
            if not as_flags:
                raise
            seen.add("no flag")

    fields = some.sampled_from(known) | some.sampled_from(["ppo.kl_cof", "x", "ppo", "data.paths.x", "sft.optimizer"])
    override = some.tuples(fields.filter(lambda name: name != "data.paths.x"), values)
    fuzzed(examples, check, overrides=some.lists(override, min_size=1, max_size=3), as_flags=some.booleans())
    assert seen == {"read", "refused", "no flag"}


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def loads(path, seen):
    try:
        load_pretrained(path)
        seen.add("read")
    except (CheckpointError, FileNotFoundError) as error:
        seen.add("refused" if str(error) else "without a word")


@many
def test_safetensors(examples, tmp_path):
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


@many
def test_the_config_of_a_checkpoint(examples, tmp_path):
    folder = tiny.write_checkpoint(tmp_path / "model", "llama")
    file = folder / "config.json"
    whole = json.loads(file.read_text())
    seen = set()

    def check(content):
        file.write_bytes(content)
        loads(folder, seen)

    changes = some.dictionaries(
        some.sampled_from(sorted(whole)) | some.text(max_size=5), values, min_size=1, max_size=3
    )
    contents = damaged(file.read_bytes()) | changes.map(lambda change: json.dumps(whole | change).encode())
    fuzzed(examples, check, content=contents)
    assert seen == {"read", "refused"}


@many
def test_gguf(examples, tmp_path):
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
    # What is there, but more of it than a tokenizer needs: the gguf package takes 200 times its size.
    field = key + struct.pack("<IIQ", 9, 8, 2_000_000)
    gguf.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + field + b"\0" * 16_000_000)
    with pytest.raises(CheckpointError, match="claims 2,000,000 entries; all together may have 1,500,000"):
        load_pretrained(gguf)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < GROWTH
