"""Loading and saving checkpoints: heads, file formats, dtypes, meshes, and broken checkpoints."""

import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jax_rlhf import CheckpointError, load_pretrained, save_pretrained
from jax_rlhf.hub import describe_pretrained
from tests.hub import tiny
from tests.hub.test_families import outputs, real_difference


@pytest.fixture
def llama(tmp_path):
    return tiny.write_checkpoint(tmp_path / "llama", "llama")


def rewrite(folder, change):
    """Passes the tensors of a checkpoint through `change` and writes them back."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors")
    return folder


def set_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def same_params(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: x.dtype == y.dtype and bool((x == y).all()), a, b)))


# ---- heads ---------------------------------------------------------------------------------------------------------


def test_new_scalar_head_is_normal_with_a_key_and_zero_without(tmp_path):
    folder = tiny.write_checkpoint(tmp_path / "opt", "opt_350m")
    zero = load_pretrained(folder, head="scalar").params["scalar_head"]["kernel"]
    assert zero.shape == (20, 1)  # opt-350m's head reads the projected width
    assert not zero.any()
    draws = [load_pretrained(folder, head="scalar", key=jax.random.key(i)).params for i in range(40)]
    numbers = np.concatenate([params["scalar_head"]["kernel"].ravel() for params in draws])
    assert abs(numbers.std() * math.sqrt(21) - 1) < 0.1  # 800 draws: within 4 standard errors
    assert abs(numbers.mean()) < 4 / math.sqrt(21 * 800)


def test_a_scalar_head_on_a_language_model_keeps_its_layers(llama):
    lm, scalar = load_pretrained(llama), load_pretrained(llama, head="scalar")
    assert same_params(lm.params["layers"], scalar.params["layers"])
    assert "lm_head" not in scalar.params


def test_a_reward_models_biases_are_saved_and_loaded(llama, tmp_path):
    scalar = dataclasses.replace(load_pretrained(llama, head="scalar"), reward_bias=0.5, missing_eos_bias=0.25)
    save_pretrained(tmp_path / "reward", scalar)
    again = load_pretrained(tmp_path / "reward", head="scalar")
    assert (again.reward_bias, again.missing_eos_bias) == (0.5, 0.25)
    save_pretrained(tmp_path / "policy", load_pretrained(llama))
    assert "reward_missing_eos_bias" not in json.loads((tmp_path / "policy" / "config.json").read_text())
    set_config(tmp_path / "reward", reward_missing_eos_bias="much")
    with pytest.raises(CheckpointError, match="reward_missing_eos_bias='much' must be a finite number"):
        load_pretrained(tmp_path / "reward", head="scalar")


def test_classifier_with_several_labels_is_refused(tmp_path):
    folder = tiny.write_checkpoint(tmp_path / "many", "llama", "scalar")
    rewrite(folder, lambda tensors: tensors | {"score.weight": np.zeros((3, 36), np.float32)})
    with pytest.raises(CheckpointError, match=r"score\.weight.*\[3, 36\].*\[1, 36\].*num_labels"):
        load_pretrained(folder, head="scalar")


def test_unknown_head_and_dtype_are_refused(llama):
    with pytest.raises(ValueError, match="head='classification'"):
        load_pretrained(llama, head="classification")
    with pytest.raises(ValueError, match="int8"):
        load_pretrained(llama, dtype=jnp.int8)


def test_a_stored_lm_head_that_differs_from_the_embedding_is_untied(tmp_path):
    folder = tiny.write_checkpoint(tmp_path / "tied", "smollm2")
    tied = outputs(load_pretrained(folder))
    rewrite(folder, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    assert (outputs(load_pretrained(folder)) == tied).all()  # equal numbers: tied
    rewrite(folder, lambda tensors: tensors | {"lm_head.weight": 2 * tensors["lm_head.weight"]})
    apart = load_pretrained(folder)
    assert not apart.model.config.tie_embeddings
    np.testing.assert_allclose(outputs(apart), 2 * tied, atol=1e-4)


def test_tied_embeddings_may_be_stored_under_the_heads_name(tmp_path):
    folder = tiny.write_checkpoint(tmp_path / "tied", "smollm2")
    tied = outputs(load_pretrained(folder))
    rewrite(folder, lambda tensors: {"lm_head.weight": tensors.pop("model.embed_tokens.weight"), **tensors})
    assert (outputs(load_pretrained(folder)) == tied).all()


# ---- forms of a checkpoint -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["gpt2", "smollm2", "opt", "pythia"])
def test_a_base_models_file_without_prefix_is_read(case, tmp_path):
    folder = tiny.write_checkpoint(tmp_path / case, case)
    whole = load_pretrained(folder, head="scalar").params
    bases = ("transformer.", "model.", "gpt_neox.")

    def strip(tensors):
        return {name.split(".", 1)[1]: x for name, x in tensors.items() if name.startswith(bases)}

    assert same_params(load_pretrained(rewrite(folder, strip), head="scalar").params, whole)


def test_known_buffers_are_ignored(tmp_path):
    folder = tiny.write_checkpoint(tmp_path / "gpt2", "gpt2")
    buffers = {
        "transformer.h.0.attn.bias": np.ones((1, 1, 8, 8), np.uint8),
        "transformer.h.0.attn.masked_bias": np.float32(-1e4).reshape(1),
        "lm_head.weight": tiny.tensors("gpt2")["transformer.wte.weight"],
    }
    rewrite(folder, lambda tensors: tensors | buffers)
    assert real_difference(outputs(load_pretrained(folder)), tiny.stored_logits("gpt2")) < 2e-4
    folder = tiny.write_checkpoint(tmp_path / "pythia", "pythia")
    buffers = {
        "gpt_neox.layers.1.attention.bias": np.ones((1, 1, 8, 8), bool),
        "gpt_neox.layers.1.attention.masked_bias": np.float32(-1e9).reshape(1),
        "gpt_neox.layers.1.attention.rotary_emb.inv_freq": np.ones(3, np.float32),
    }
    rewrite(folder, lambda tensors: tensors | buffers)
    assert real_difference(outputs(load_pretrained(folder)), tiny.stored_logits("pythia")) < 2e-4


def test_sharded_files_and_their_index_are_saved_and_loaded(llama, tmp_path):
    whole = load_pretrained(llama)
    save_pretrained(tmp_path / "shards", whole, max_shard_bytes=20_000)
    files = sorted(file.name for file in (tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    sizes = sum(tensor.nbytes for file in files for tensor in load_file(tmp_path / "shards" / file).values())
    assert index["metadata"]["total_size"] == sizes
    assert same_params(load_pretrained(tmp_path / "shards").params, whole.params)
    pytest.importorskip("torch")
    from tests.hub import torch_oracle

    theirs = torch_oracle.outputs(torch_oracle.load(tmp_path / "shards", "lm"), "lm")
    assert real_difference(outputs(whole), theirs) < 2e-4


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_stored_dtype_is_kept_or_cast(dtype, llama, tmp_path):
    rewrite(llama, lambda tensors: {name: x.astype(dtype) for name, x in tensors.items()})
    stored = load_pretrained(llama)
    assert {leaf.dtype for leaf in jax.tree.leaves(stored.params)} == {jnp.dtype(dtype)}
    assert stored.model.config.dtype == dtype
    assert outputs(stored).dtype == np.float32
    wide = load_pretrained(llama, dtype=jnp.float32)
    assert same_params(wide.params, jax.tree.map(lambda x: x.astype(jnp.float32), stored.params))
    save_pretrained(tmp_path / "saved", stored)
    with safe_open(tmp_path / "saved" / "model.safetensors", "np") as file:
        name = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}[jnp.dtype(dtype).name]
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {name}  # noqa: SIM118
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == jnp.dtype(dtype).name
    assert same_params(load_pretrained(tmp_path / "saved").params, stored.params)


def test_mixed_dtypes_are_kept(llama):
    def narrow(tensors):
        return {name: x if "norm" in name else x.astype(ml_dtypes.bfloat16) for name, x in tensors.items()}

    params = load_pretrained(rewrite(llama, narrow)).params
    assert params["layers"]["mlp_norm"]["scale"].dtype == jnp.float32
    assert params["layers"]["mlp"]["up"]["kernel"].dtype == jnp.bfloat16


def test_a_hub_id_is_loaded_from_the_local_cache(llama, tmp_path, monkeypatch):
    repository = tmp_path / "cache" / "models--someone--tiny"
    shutil.copytree(llama, repository / "snapshots" / "abc123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc123")
    (repository / "refs" / "v2").write_text("abc123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    whole = load_pretrained(llama)
    for revision in (None, "v2"):
        assert same_params(load_pretrained("someone/tiny", revision=revision).params, whole.params)
    (repository / "snapshots" / "abc123" / "model.safetensors").unlink()  # as for a repository with pickles only
    with pytest.raises(CheckpointError, match=r"someone/tiny has no[\s\S]*from_pretrained\('someone/tiny'\)"):
        load_pretrained("someone/tiny")
    with pytest.raises(FileNotFoundError, match="someone/other"):
        load_pretrained("someone/other")


def test_a_model_with_fewer_layers_is_saved_with_fewer_layers(tmp_path):
    """The model has the bottom two layers of a checkpoint, with their sliding windows."""
    whole = load_pretrained(tiny.write_checkpoint(tmp_path / "gemma", "gemma2"))
    config = whole.model.config
    config = config.replace(num_layers=2, sliding_layers=config.sliding_layers[:2])
    params = whole.params | {"layers": jax.tree.map(lambda leaf: leaf[:2], whole.params["layers"])}
    cut = type(whole)(whole.model.clone(config=config), params)
    save_pretrained(tmp_path / "cut", cut)
    again = load_pretrained(tmp_path / "cut")
    assert again.model.config == config
    assert (outputs(again) == outputs(cut)).all()


# ---- meshes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "explicit"),
    [({"fsdp": 4, "tensor": 2}, False), ({"data": 2, "fsdp": 2, "tensor": 2}, True), ({"fsdp": 2}, False)],
    ids=str,
)
@pytest.mark.parametrize("case", ["llama", "phi3", "gpt2", "opt_350m"])
def test_a_model_loaded_onto_a_mesh_computes_and_saves_the_same(case, sizes, explicit, tmp_path):
    folder = tiny.write_checkpoint(tmp_path / case, case)
    set_config(folder, **({"intermediate_size": 50} if case in ("llama", "phi3") else {}))
    set_config(folder, **({"ffn_dim": 50} if case == "opt_350m" else {}))

    def widen(tensors):  # to an MLP width that two devices divide
        def pad(name, x):
            halves = np.split(x, 2) if "gate_up" in name else [x]
            axes = [(0, 1 if size == 49 else 0) for size in halves[0].shape]
            return np.concatenate([np.pad(half, axes) for half in halves])

        return {name: pad(name, x) for name, x in tensors.items()}

    rewrite(folder, widen)
    count = math.prod(sizes.values())
    if explicit:
        mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes))
    else:
        mesh = Mesh(np.array(jax.devices()[:count]).reshape(tuple(sizes.values())), tuple(sizes))
    alone, spread = load_pretrained(folder), load_pretrained(folder, mesh=mesh)
    up = spread.params["layers"]["mlp"]["up"]["kernel"]
    assert up.sharding.spec == PartitionSpec(None, "fsdp", "tensor" if "tensor" in sizes else None)
    assert len({shard.device for shard in up.addressable_shards}) == count
    assert up.addressable_shards[0].data.size * sizes["fsdp"] * sizes.get("tensor", 1) == up.size
    table = spread.params["embedding"]["table"]
    assert table.shape[0] == (62 if "tensor" in sizes else 61)  # padded so that two devices divide it
    theirs = outputs(spread)
    assert theirs.shape[-1] == tiny.VOCAB  # the padding is not in the logits
    assert real_difference(theirs, outputs(alone)) < 2e-5
    save_pretrained(tmp_path / "saved", spread)
    assert same_params(load_pretrained(tmp_path / "saved").params, alone.params)


def test_an_error_about_a_mesh_names_the_parameter_and_the_sizes(llama):
    mesh = Mesh(np.array(jax.devices()[:8]), ("tensor",))
    with pytest.raises(
        ValueError, match=r"'tensor' of size 8 does not divide axis .* of size \d+ of parameter .*do: 1"
    ):
        load_pretrained(llama, mesh=mesh)


# ---- broken checkpoints --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["score", "v_head.summary", "v_head", "value_head", "value", "classifier", "model.score"]
)
@pytest.mark.parametrize("bias", [None, 0.75])
def test_scalar_heads_of_other_programs_are_read(tmp_path, name, bias):
    """The weight is the head, the bias is added to each score, and both are saved."""
    folder = tiny.write_checkpoint(tmp_path / "reward", "llama", "scalar")
    expected = load_file(folder / "model.safetensors")["score.weight"][0]

    def renamed(tensors):
        head = {f"{name}.weight": tensors.pop("score.weight")}
        return tensors | head | ({} if bias is None else {f"{name}.bias": np.float32([bias])})

    rewrite(folder, renamed)
    reward = load_pretrained(folder, head="scalar")
    assert np.array_equal(reward.params["scalar_head"]["kernel"][:, 0], expected)
    assert (reward.reward_bias, reward.new_head) == (bias or 0.0, False)
    assert describe_pretrained(folder, head="scalar").scalar_head == name
    save_pretrained(tmp_path / "saved", reward)
    again = load_pretrained(tmp_path / "saved", head="scalar")
    assert (again.reward_bias, again.new_head) == (bias or 0.0, False)
    assert same_params(again.params, reward.params)


def test_a_language_model_with_a_value_head_loads_with_either_head(llama):
    rewrite(llama, lambda tensors: tensors | {"v_head.summary.weight": np.ones((1, 36), np.float32)})
    assert "lm_head" in load_pretrained(llama).params
    assert load_pretrained(llama, head="scalar").params["scalar_head"]["kernel"].sum() == 36


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"score.0.weight": (36, 36), "score.2.weight": (1, 36)}, r"several layers \(score.0.weight, score.2.weight\)"),
        (
            {"score.weight": (1, 36), "v_head.weight": (1, 36)},
            r"the scalar head is ambiguous.* score.weight, v_head.weight",
        ),
        ({"score.bias": (1,)}, r"the scalar head is ambiguous.* score.bias. Keep the tensors of one layer"),
        ({"v_head.weight": (2, 36)}, r"'v_head.weight' has shape \[2, 36\].* one label"),
        (
            {"score.weight": (1, 36), "score.bias": (2,)},
            r"'score.bias' has shape \[2\]; a scalar head must have one label",
        ),
    ],
)
def test_an_error_names_the_tensors_of_an_unusable_scalar_head(llama, tensors, message):
    rewrite(llama, lambda trunk: trunk | {name: np.ones(shape, np.float32) for name, shape in tensors.items()})
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(llama, head="scalar")


@pytest.mark.parametrize("key", [None, jax.random.key(0)])
@pytest.mark.parametrize("name", ["scorer.out.weight", "score.modules_to_save.default.weight"])
def test_an_error_names_the_tensor_that_looks_like_the_scalar_head(tmp_path, name, key):
    folder = tiny.write_checkpoint(tmp_path / "reward", "llama", "scalar")
    set_config(folder, architectures=["LlamaForSequenceClassification"])
    rewrite(folder, lambda tensors: tensors | {name: tensors.pop("score.weight")})
    with pytest.raises(
        CheckpointError, match=rf"{name} looks like its scalar head, .* Rename it to score.weight, of shape"
    ):
        load_pretrained(folder, head="scalar", key=key)


def test_a_transposed_tensor_is_also_recognised_as_a_scalar_head(llama):
    rewrite(llama, lambda tensors: tensors | {"out.weight": np.ones((36, 1), np.float32)})
    with pytest.raises(CheckpointError, match=r"out.weight looks like its scalar head"):
        load_pretrained(llama, head="scalar")


def test_an_error_names_the_separate_file_of_a_value_head(llama):
    """LLaMA-Factory writes the value head to a separate file."""
    save_file({"v_head.summary.weight": np.ones((1, 36), np.float32)}, llama / "value_head.safetensors")
    with pytest.raises(
        CheckpointError, match=r"a separate file, value_head.safetensors, which is not supported. Put its"
    ):
        load_pretrained(llama, head="scalar")


def test_a_classifier_without_its_head_is_an_error_unless_a_key_is_given(tmp_path):
    folder = tiny.write_checkpoint(tmp_path / "reward", "llama", "scalar")
    set_config(folder, architectures=["LlamaForSequenceClassification"])
    rewrite(folder, lambda tensors: {name: array for name, array in tensors.items() if name != "score.weight"})
    for read in (load_pretrained, describe_pretrained):
        with pytest.raises(CheckpointError, match=r"has no score\.weight. Its scalar head was not saved"):
            read(folder, head="scalar")
    assert load_pretrained(folder, head="scalar", key=jax.random.key(0)).new_head
    assert describe_pretrained(folder, head="scalar", new_head=True).scalar_head is None


def test_a_reward_model_loaded_as_a_policy_is_an_error_or_a_warning(tmp_path, caplog):
    untied = tiny.write_checkpoint(tmp_path / "untied", "llama", "scalar")
    for read in (load_pretrained, describe_pretrained):
        with pytest.raises(CheckpointError, match=r"is a reward model or a critic .* no LM head"):
            read(untied, head="lm")
    tied = tiny.write_checkpoint(tmp_path / "tied", "smollm2", "scalar")
    load_pretrained(tied)
    assert "is a reward model or a critic" in caplog.text


@pytest.mark.parametrize("base", ["org/base", "x'); import os; os.system('rm -rf ~", None])
def test_a_peft_adapter_is_an_error_that_recommends_merging_it(tmp_path, base):
    """If the base model's name could be code, it does not appear in the recommended command."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": base}))
    save_file({"base_model.model.q_proj.lora_A.weight": np.zeros((8, 4), np.float32)}, tmp_path / "adapter.safetensors")
    for read in (load_pretrained, describe_pretrained):
        with pytest.raises(CheckpointError, match=r"is a PEFT adapter \(LORA\), not a whole model") as raised:
            read(tmp_path)
        assert "merge_and_unload" in str(raised.value)
        assert ("org/base" in str(raised.value)) == (base == "org/base")
        assert "os.system" not in str(raised.value)


def test_missing_tensor_is_named(llama):
    rewrite(llama, lambda tensors: {k: v for k, v in tensors.items() if k != "model.layers.1.mlp.up_proj.weight"})
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*missing.*model\.layers\.1\.mlp\.up_proj\.weight"):
        load_pretrained(llama)


def test_a_missing_lm_head_is_an_error_but_a_missing_scalar_head_is_not(llama):
    rewrite(llama, lambda tensors: {k: v for k, v in tensors.items() if k != "lm_head.weight"})
    with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight"):
        load_pretrained(llama)
    load_pretrained(llama, head="scalar")


def test_wrong_shape_is_named(llama):
    rewrite(llama, lambda tensors: tensors | {"model.norm.weight": np.ones(35, np.float32)})
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*'model\.norm\.weight'.*\[35\].*\[36\]"):
        load_pretrained(llama)


def test_extra_tensor_is_named(llama):
    rewrite(llama, lambda tensors: tensors | {"model.layers.3.mlp.up_proj.weight": np.ones((49, 36), np.float32)})
    with pytest.raises(CheckpointError, match=r"not part of the model.*model\.layers\.3\.mlp\.up_proj\.weight"):
        load_pretrained(llama)


def test_a_bias_that_the_config_disables_is_an_error(llama):
    rewrite(llama, lambda tensors: tensors | {"model.layers.0.self_attn.q_proj.bias": np.ones(60, np.float32)})
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.self_attn\.q_proj\.bias"):
        load_pretrained(llama)


def test_unsupported_dtype_is_named(llama):
    rewrite(llama, lambda tensors: tensors | {"model.norm.weight": np.ones(36, np.int8)})
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' is I8"):
        load_pretrained(llama)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_file_is_named(llama, keep):
    file = llama / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:keep] if keep >= 0 else content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a whole safetensors file"):
        load_pretrained(llama)


def test_header_that_claims_terabytes_is_refused(llama):
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    (llama / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_pretrained(llama)


def test_pickled_weights_are_refused_with_the_conversion_command(llama):
    (llama / "model.safetensors").unlink()
    (llama / "pytorch_model.bin").write_bytes(b"\x80\x04never opened")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin[\s\S]*python -c .*save_pretrained"):
        load_pretrained(llama)


def test_an_error_names_the_missing_folder_or_file(llama, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_pretrained(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text((llama / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        load_pretrained(tmp_path / "empty")
    (llama / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_pretrained(llama)


def test_an_index_that_names_a_missing_or_outside_file_is_an_error(llama, tmp_path):
    save_pretrained(tmp_path / "shards", load_pretrained(llama), max_shard_bytes=20_000)
    (tmp_path / "shards" / "model-00002-of-00006.safetensors").unlink(missing_ok=True)
    missing = sorted((tmp_path / "shards").glob("*.safetensors"))[0]
    missing.unlink()
    with pytest.raises(FileNotFoundError, match="is missing"):
        load_pretrained(tmp_path / "shards")
    index = tmp_path / "shards" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../llama/model.safetensors"}}))
    with pytest.raises(CheckpointError, match="not in its folder"):
        load_pretrained(tmp_path / "shards")
    index.write_text("{")
    with pytest.raises(CheckpointError, match="not a safetensors index"):
        load_pretrained(tmp_path / "shards")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "t5"}, "'t5' is not a supported architecture; llama"),
        ({"model_type": None}, "None is not a supported architecture"),
        ({"model_type": "gemma3"}, "text-only"),
        ({"hidden_act": "mish"}, "activation 'mish'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"num_key_value_heads": 4}, "multiple of num_kv_heads"),
        ({"hidden_size": "large"}, "transformers does not accept it"),
    ],
    ids=str,
)
def test_an_unusable_config_is_an_error_that_says_why(changes, message, llama):
    set_config(llama, **changes)
    with pytest.raises(CheckpointError, match=message) as error:
        load_pretrained(llama)
    assert str(llama) in str(error.value)


@pytest.mark.parametrize("content", ["{", "[1]", ""])
def test_a_config_that_is_not_an_object_is_an_error(content, llama):
    (llama / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_pretrained(llama)


def test_remote_code_in_a_config_is_never_run(llama):
    set_config(llama, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    (llama / "evil.py").write_text("raise SystemExit('ran')")
    pretrained = load_pretrained(llama)
    assert real_difference(outputs(pretrained), tiny.stored_logits("llama")) < 2e-4
    save_pretrained(llama.parent / "saved", pretrained)
    assert "auto_map" not in json.loads((llama.parent / "saved" / "config.json").read_text())


def test_unrolled_params_and_hand_made_configs_cannot_be_saved(llama, tmp_path):
    from jax_rlhf.models import unstack_layers

    pretrained = load_pretrained(llama)
    with pytest.raises(ValueError, match="unrolled"):
        save_pretrained(tmp_path / "x", type(pretrained)(pretrained.model, unstack_layers(pretrained.params, 3)))
    config = pretrained.model.config.replace(hf_config="")
    with pytest.raises(CheckpointError, match="config_from_hub"):
        save_pretrained(tmp_path / "x", type(pretrained)(pretrained.model.clone(config=config), pretrained.params))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("field", [{"dtype": False}, {"dtype": 3}, {"dtype": ["a"]}, {"inner": {"dtype": 7}}])
def test_a_generation_config_that_cannot_be_saved_is_refused_when_loaded(tmp_path, field):
    """transformers reads some generation configs that it cannot write, so the trained model could not be saved."""
    folder = tiny.write_checkpoint(tmp_path / "llama", "llama")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2} | field))
    with pytest.raises(CheckpointError, match=r"generation_config\.json: transformers cannot use it"):
        load_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "dtype": "bfloat16"}))
    save_pretrained(tmp_path / "saved", load_pretrained(folder))
    assert json.loads((tmp_path / "saved" / "generation_config.json").read_text())["eos_token_id"] == 2
