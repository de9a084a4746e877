"""transformers 4, transformers 5 and other programs read the same model and tokenizer from a saved folder."""

import json
import os
import subprocess

import jax
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jax_rlhf import load_pretrained, save_pretrained
from jax_rlhf.hub import Pretrained, config_from_hub
from jax_rlhf.hub.export import config_fields, write_tokenizer
from jax_rlhf.hub.families import config_to_hub
from jax_rlhf.hub.tokenizer import load_tokenizer
from jax_rlhf.models import Decoder, init_params
from tests.hub import read_by_transformers4, tiny
from tests.processes import ROOT

CHATML = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
EVERY_CASE = [(case, head) for case in tiny.CASES for head in ("lm", "scalar")]


def byte_level_bos():
    """A tokenizer like Llama 3's: byte-level, adds BOS, and has additional special tokens."""
    special = ["<bos>", "<eos>", "<pad>", "<|im_start|>", "<|im_end|>"]
    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "He", "Hel"]
    bare = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [("H", "e"), ("He", "l")]))
    bare.pre_tokenizer, bare.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bare.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    bare.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    made = PreTrainedTokenizerFast(
        tokenizer_object=bare, bos_token="<bos>", eos_token="<|im_end|>", pad_token="<pad>", chat_template=CHATML
    )
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|new|>"]})
    return made


def sentencepiece_like():
    """A tokenizer like Llama 2's and Gemma's: ▁ for spaces, and bytes for characters without a piece."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghHeiloTr,!", "▁H", "▁He"]
    merges = [("▁", "H"), ("▁H", "e")]
    vocabulary = {word: i for i, word in enumerate(words)}
    bare = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    bare.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    bare.decoder = decoders.Sequence(steps)
    bare.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def several_templates():
    """A tokenizer like Hermes's and Command-R's: one template for chats, and one for chats with tools."""
    made = byte_level_bos()
    made.chat_template = {"default": CHATML, "tool_use": "{{ 'tools' }}" + CHATML}
    return made


TOKENIZERS = {"byte_level": byte_level_bos, "sentencepiece": sentencepiece_like, "templates": several_templates}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder, config) per case and head, and per tokenizer. Each was saved, loaded and saved again."""
    folder, found = tmp_path_factory.mktemp("export"), {}
    for case, head in EVERY_CASE:
        model = load_pretrained(tiny.write_checkpoint(folder / "given" / f"{case}-{head}", case, head), head=head)
        save_pretrained(folder / "once" / f"{case}-{head}", model)
        save_pretrained(folder / f"{case}-{head}", load_pretrained(folder / "once" / f"{case}-{head}", head=head))
        found[case, head] = folder / f"{case}-{head}", model.model.config
    for name, make in TOKENIZERS.items():
        config = config_from_hub(tiny.CASES["llama"] | {"vocab_size": 400, "bos_token_id": None, "pad_token_id": None})
        model = Decoder(config)
        save_pretrained(folder / name / "once", Pretrained(model, init_params(model, jax.random.key(0)), make()))
        save_pretrained(folder / name / "twice", load_pretrained(folder / name / "once"))
        found[name] = folder / name / "twice", config
    return found


@pytest.fixture(scope="module")
def read(saved):
    """What transformers 4 reads from each saved folder."""
    python = os.environ.get("TRANSFORMERS4_PYTHON")
    if python is None:
        pytest.skip("TRANSFORMERS4_PYTHON names no interpreter with transformers 4; launch/test.sh makes one")
    folders = [str(folder) for folder, _ in saved.values()]
    script = ROOT / "tests" / "hub" / "read_by_transformers4.py"
    printed = subprocess.run([python, script, *folders], capture_output=True, text=True, check=False)
    assert printed.returncode == 0, printed.stderr
    return json.loads(printed.stdout)


@pytest.mark.parametrize(("case", "head"), EVERY_CASE)
def test_transformers_4_reads_the_same_model(saved, read, case, head):
    """Without the fields that only version 5 knows, the config that version 4 reads describes the same decoder."""
    folder, config = saved[case, head]
    seen = read[str(folder)]
    assert seen["version"].startswith("4.")
    content = {name: value for name, value in seen["config"].items() if name != "rope_parameters"}
    assert config_from_hub(content) == config.replace(dtype="float32")
    assert seen["attributes"]["dtype"].removeprefix("torch.") == "float32"
    assert head == "lm" or seen["attributes"]["num_labels"] == 1
    if head == "lm":
        ids = {name: seen["generation"][name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        assert ids == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@pytest.mark.parametrize(("case", "head"), EVERY_CASE)
def test_transformers_5_reads_the_same_model(saved, case, head):
    folder, config = saved[case, head]
    content = json.loads((folder / "config.json").read_text())
    assert config_from_hub(content) == config
    for stale in ("is_local", "local_files_only", "auto_map"):
        assert stale not in content


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("smollm2", {"rope_theta": 100000.0, "rope_scaling": None}),
        ("llama_old_names", {"rope_theta": 500.0, "rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
        (
            "llama_llama3",
            {
                "hidden_act": "silu",  # a default of this version
                "rope_theta": 1000.0,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16,
                },
            },
        ),
        ("pythia", {"rotary_emb_base": 500, "rotary_pct": 0.25, "rope_scaling": None}),
        (
            "phi3_longrope",
            {
                "rope_theta": 10000.0,
                "partial_rotary_factor": 1.0,
                "rope_scaling": {
                    "type": "longrope",
                    "short_factor": [1.0, 1.1, 1.2, 1.3],
                    "long_factor": [1.5, 2.0, 3.0, 4.0],
                },
            },
        ),
        ("phi3", {"partial_rotary_factor": 0.75, "rope_scaling": None}),
        (
            "gemma3_scaled",
            {
                "rope_theta": 5000.0,
                "rope_local_base_freq": 100.0,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                "hidden_activation": "gelu_pytorch_tanh",
            },
        ),
        ("gpt2", {"torch_dtype": "float32", "dtype": "float32", "n_inner": None}),
    ],
)
def test_the_config_has_the_fields_that_other_programs_read(saved, case, expected):
    content = json.loads((saved[case, "lm"][0] / "config.json").read_text())
    assert {name: content[name] for name in expected} == expected


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_tokenizer_is_unchanged_after_it_is_saved_twice(saved, kind):
    """A tokenizer that was saved, loaded and saved again gives the same ids for the same texts."""
    folder, expected = saved[kind][0], read_by_transformers4.tokens_of(TOKENIZERS[kind]())
    assert read_by_transformers4.tokens_of(load_tokenizer(folder)) == expected
    assert read_by_transformers4.tokens_of(AutoTokenizer.from_pretrained(folder)) == expected
    content = json.loads((folder / "tokenizer_config.json").read_text())
    assert content["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"is_local", "local_files_only", "backend", "auto_map"} & content.keys()


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_transformers_4_reads_the_same_tokenizer(saved, read, kind):
    expected = read_by_transformers4.tokens_of(TOKENIZERS[kind]())
    assert read[str(saved[kind][0])]["tokens"] == expected


def test_a_model_with_several_templates_can_be_saved_again(saved, tmp_path):
    once = load_pretrained(saved["templates"][0])
    for _ in range(2):
        save_pretrained(tmp_path / "model", once)
    again = load_tokenizer(tmp_path / "model")
    tools = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}]
    with_tools = again.apply_chat_template(read_by_transformers4.CHAT, tools=tools, tokenize=False)
    assert with_tools == "tools" + again.apply_chat_template(read_by_transformers4.CHAT, tokenize=False)


def test_the_padding_side_is_saved(tmp_path):
    made = byte_level_bos()
    made.padding_side = "left"
    write_tokenizer(tmp_path, made)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["padding_side"] == "left"
    assert load_tokenizer(tmp_path).padding_side == "left"


def test_a_factor_that_transformers_4_computes_itself_is_not_written():
    """Version 4 accepts only three fields in Phi-3's rope_scaling."""
    case = tiny.CASES["phi3_longrope"]
    factor = case["max_position_embeddings"] / case["original_max_position_embeddings"]
    given = case | {"rope_scaling": case["rope_scaling"] | {"factor": factor}}
    written = config_fields(config_to_hub(Decoder(config_from_hub(given)), "float32"))
    assert written["rope_scaling"].keys() == {"type", "short_factor", "long_factor"}


def test_a_setting_that_transformers_4_cannot_express_is_still_written(tmp_path):
    """Version 4 must fail on Phi-3's attention factor, not ignore it and compute another one."""
    scaling = tiny.CASES["phi3_longrope"]["rope_scaling"] | {"attention_factor": 1.5}
    config = config_from_hub(tiny.CASES["phi3_longrope"] | {"rope_scaling": scaling})
    model = Decoder(config)
    save_pretrained(tmp_path / "model", Pretrained(model, init_params(model, jax.random.key(0))))
    content = json.loads((tmp_path / "model" / "config.json").read_text())
    assert content["rope_scaling"]["attention_factor"] == 1.5
    assert config_from_hub(content) == config
