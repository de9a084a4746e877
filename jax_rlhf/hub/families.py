"""The table of model families: how a family's `config.json` sets a `DecoderConfig`, and the names of its tensors.

`Family.modules` maps a module of the decoder to a module of the checkpoint. The names of tensors follow from it:
kernel, scale and table are the checkpoint's `.weight`, and bias is its `.bias`. If several modules of the decoder are
mapped to one module of the checkpoint, they are fused there.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from transformers import CONFIG_MAPPING, PretrainedConfig

from jax_rlhf.hub import decoder_fields as settings
from jax_rlhf.hub.checkpoint_error import CheckpointError
from jax_rlhf.hub.decoder_fields import Fields
from jax_rlhf.hub.export import config_fields
from jax_rlhf.hub.hub_tensor import HubTensor
from jax_rlhf.hub.limits import check_sizes, checked_ids
from jax_rlhf.models import Decoder, DecoderConfig, abstract_params
from jax_rlhf.models.layers import ACTIVATIONS
from jax_rlhf.models.rotary import Rotary, frequencies


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One family of models.

    Attributes:
      fields: reads the DecoderConfig's fields from a config dict as transformers normalises it.
      architectures: transformers' class names of the model with an LM head and with a scalar head.
      base: prefix of every tensor's name except the head's; files of a base model without a head lack it.
      modules: module of the decoder → module of the checkpoint under `base`, with "{}" for the layer index.
      lm_head: module of the untied LM head.
      conv1d: linear weights are stored as [inputs, outputs].
      interleaved: the fused query, key and value weights are interleaved head by head.
    """

    fields: Callable[[Fields], Fields]
    architectures: tuple[str, str]
    base: str
    modules: Mapping[str, str]
    lm_head: str = "lm_head"
    conv1d: bool = False
    interleaved: bool = False


# ---- tensor names --------------------------------------------------------------------------------------------------

_LLAMA_MODULES = {
    "embedding/table": "embed_tokens",
    "layers/attention_norm": "layers.{}.input_layernorm",
    "layers/attention/query": "layers.{}.self_attn.q_proj",
    "layers/attention/key": "layers.{}.self_attn.k_proj",
    "layers/attention/value": "layers.{}.self_attn.v_proj",
    "layers/attention/query_norm": "layers.{}.self_attn.q_norm",
    "layers/attention/key_norm": "layers.{}.self_attn.k_norm",
    "layers/attention/out": "layers.{}.self_attn.o_proj",
    "layers/mlp_norm": "layers.{}.post_attention_layernorm",
    "layers/mlp/gate": "layers.{}.mlp.gate_proj",
    "layers/mlp/up": "layers.{}.mlp.up_proj",
    "layers/mlp/down": "layers.{}.mlp.down_proj",
    "final_norm": "norm",
}
_GEMMA_MODULES = _LLAMA_MODULES | {
    "layers/attention_post_norm": "layers.{}.post_attention_layernorm",
    "layers/mlp_norm": "layers.{}.pre_feedforward_layernorm",
    "layers/mlp_post_norm": "layers.{}.post_feedforward_layernorm",
}
_PHI3_MODULES = _LLAMA_MODULES | {
    "layers/attention/query": "layers.{}.self_attn.qkv_proj",
    "layers/attention/key": "layers.{}.self_attn.qkv_proj",
    "layers/attention/value": "layers.{}.self_attn.qkv_proj",
    "layers/mlp/gate": "layers.{}.mlp.gate_up_proj",
    "layers/mlp/up": "layers.{}.mlp.gate_up_proj",
}
_GPT2_MODULES = {
    "embedding/table": "wte",
    "embedding/positions": "wpe",
    "layers/attention_norm": "h.{}.ln_1",
    "layers/attention/query": "h.{}.attn.c_attn",
    "layers/attention/key": "h.{}.attn.c_attn",
    "layers/attention/value": "h.{}.attn.c_attn",
    "layers/attention/out": "h.{}.attn.c_proj",
    "layers/mlp_norm": "h.{}.ln_2",
    "layers/mlp/up": "h.{}.mlp.c_fc",
    "layers/mlp/down": "h.{}.mlp.c_proj",
    "final_norm": "ln_f",
}
_GPT_NEOX_MODULES = {
    "embedding/table": "embed_in",
    "layers/attention_norm": "layers.{}.input_layernorm",
    "layers/attention/query": "layers.{}.attention.query_key_value",
    "layers/attention/key": "layers.{}.attention.query_key_value",
    "layers/attention/value": "layers.{}.attention.query_key_value",
    "layers/attention/out": "layers.{}.attention.dense",
    "layers/mlp_norm": "layers.{}.post_attention_layernorm",
    "layers/mlp/up": "layers.{}.mlp.dense_h_to_4h",
    "layers/mlp/down": "layers.{}.mlp.dense_4h_to_h",
    "final_norm": "final_layer_norm",
}
_OPT_MODULES = {
    "embedding/table": "decoder.embed_tokens",
    "embedding/positions": "decoder.embed_positions",
    "embedding/project_in": "decoder.project_in",
    "layers/attention_norm": "decoder.layers.{}.self_attn_layer_norm",
    "layers/attention/query": "decoder.layers.{}.self_attn.q_proj",
    "layers/attention/key": "decoder.layers.{}.self_attn.k_proj",
    "layers/attention/value": "decoder.layers.{}.self_attn.v_proj",
    "layers/attention/out": "decoder.layers.{}.self_attn.out_proj",
    "layers/mlp_norm": "decoder.layers.{}.final_layer_norm",
    "layers/mlp/up": "decoder.layers.{}.fc1",
    "layers/mlp/down": "decoder.layers.{}.fc2",
    "final_norm": "decoder.final_layer_norm",
    "project_out": "decoder.project_out",
}


def _row(name: str, fields: Callable[[Fields], Fields], modules: Mapping[str, str] = _LLAMA_MODULES) -> Family:
    architectures = (f"{name}ForCausalLM", f"{name}ForSequenceClassification")
    return Family(fields=fields, architectures=architectures, base="model.", modules=modules)


FAMILIES: Mapping[str, Family] = {
    "llama": _row("Llama", settings.llama),  # also SmolLM and SmolLM2
    "mistral": _row("Mistral", settings.llama),
    "qwen2": _row("Qwen2", settings.qwen2),
    "qwen3": _row("Qwen3", settings.qwen3),
    "gemma2": _row("Gemma2", settings.gemma2, _GEMMA_MODULES),
    "gemma3_text": dataclasses.replace(
        _row("Gemma3", settings.gemma3, _GEMMA_MODULES),
        architectures=("Gemma3ForCausalLM", "Gemma3TextForSequenceClassification"),
    ),
    "phi3": _row("Phi3", settings.phi3, _PHI3_MODULES),
    "gpt2": Family(
        fields=settings.gpt2,
        architectures=("GPT2LMHeadModel", "GPT2ForSequenceClassification"),
        base="transformer.",
        modules=_GPT2_MODULES,
        conv1d=True,
    ),
    "gpt_neox": Family(
        fields=settings.gpt_neox,
        architectures=("GPTNeoXForCausalLM", "GPTNeoXForSequenceClassification"),
        base="gpt_neox.",
        modules=_GPT_NEOX_MODULES,
        lm_head="embed_out",
        interleaved=True,
    ),
    "opt": _row("OPT", settings.opt, _OPT_MODULES),
}
"""By `model_type` in config.json."""


# ---- configs -------------------------------------------------------------------------------------------------------


def config_from_hub(config: Mapping[str, Any]) -> DecoderConfig:
    """Converts a Hugging Face config to a `DecoderConfig`.

    Args:
      config: the content of a config.json, of any transformers version.

    Returns:
      The DecoderConfig; its `hf_config` keeps all of `config` for `save_pretrained`.

    Raises:
      CheckpointError: the `model_type` is unknown, or a setting is not supported.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        hint = " Instead of Gemma 3 with images, use a text-only checkpoint (gemma3_text)." if kind == "gemma3" else ""
        raise CheckpointError(
            f"config.json: model_type {kind!r} is not a supported architecture; {', '.join(FAMILIES)} are.{hint}"
        )
    config = _checked(config, kind)
    try:
        read = CONFIG_MAPPING[kind].from_dict(dict(config))
        normalised = read.to_dict()
        config_fields(read)  # fails here, and not after training, if the config cannot be written again
        fields = FAMILIES[kind].fields(normalised)
    except CheckpointError as error:
        raise CheckpointError(f"config.json ({kind}): {error}") from error
    except Exception as error:  # transformers' validation raises its own types; all mean an invalid config
        raise CheckpointError(
            f"config.json ({kind}): transformers does not accept it: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(fields["activation"], str) or fields["activation"] not in ACTIVATIONS:
        raise CheckpointError(
            f"config.json: activation {fields['activation']!r} is not supported; {', '.join(ACTIVATIONS)} are."
        )
    try:
        decoder = DecoderConfig(**fields, hf_config=json.dumps(normalised))
        for rotary in filter(None, (decoder.rotary, decoder.local_rotary)):
            _check_frequencies(rotary)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"config.json ({kind}): {error}") from error
    return decoder


def _checked(config: Mapping[str, Any], kind: str) -> Fields:
    """The config with checked sizes, ids and architectures; CheckpointError if one is invalid."""
    where = f"config.json ({kind})"
    try:
        check_sizes(config)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
    config = checked_ids(config, where)
    names = config.get("architectures")
    if not isinstance(names, list | None) or not all(isinstance(name, str) for name in names or ()):
        raise CheckpointError(f"{where}: architectures={str(names)[:60]} must be a list of names.")
    if config.get("quantization_config"):
        raise CheckpointError(
            f"{where}: quantization_config is set; quantized safetensors are not supported. Use the checkpoint in its "
            "original precision, or a GGUF file."
        )
    return config


def _check_frequencies(rotary: Rotary) -> None:
    """Raises ValueError if rotary settings give no valid frequencies: a list is too short, a factor is not a number."""
    for long in (False, True) if rotary.kind == "longrope" else (False,):
        try:
            with np.errstate(all="ignore"):
                found = np.asarray(frequencies(rotary, long=long), np.float64)
        except (ArithmeticError, TypeError, ValueError) as error:
            raise ValueError(f"rope_parameters of the type {rotary.kind!r} cannot be used: {error}") from error
        if found.shape != (-(-rotary.dim // 2),) or not np.isfinite(found).all():
            raise ValueError(
                f"rope_parameters of the type {rotary.kind!r} do not give {-(-rotary.dim // 2)} finite frequencies."
            )


def config_to_hub(model: Decoder, dtype: str) -> PretrainedConfig:
    """The Hugging Face config of a model: the config from which it was made, updated by later changes.

    Args:
      model: its config must come from `config_from_hub`.
      dtype: of the parameters: "float32", "bfloat16" or "float16".

    Raises:
      CheckpointError: the model was not made from a Hugging Face config.
    """
    source = _source(model.config)
    config = CONFIG_MAPPING[source["model_type"]].from_dict(source)
    config.num_hidden_layers = model.config.num_layers
    config.vocab_size = model.config.vocab_size
    config.tie_word_embeddings = model.config.tie_embeddings
    if source.get("layer_types"):  # the model may have fewer layers than the original
        sliding = model.config.sliding_layers or (False,) * model.config.num_layers
        config.layer_types = ["sliding_attention" if kind else "full_attention" for kind in sliding]
    config.architectures = [family_of(model.config).architectures[model.head == "scalar"]]
    if model.head == "scalar":
        config.num_labels = 1
    config.dtype = dtype
    # auto_map names code files of the original folder; the biases belong to another reward model.
    for stale in ("auto_map", "reward_bias", "reward_missing_eos_bias"):
        if hasattr(config, stale):
            delattr(config, stale)
    return config


def family_of(config: DecoderConfig) -> Family:
    """The family of a config that was made by `config_from_hub`; CheckpointError for another config."""
    return FAMILIES[_source(config)["model_type"]]


def _source(config: DecoderConfig) -> Fields:
    if not config.hf_config:
        raise CheckpointError(
            "this DecoderConfig was not made from a Hugging Face config, so its architecture is unknown; make it with "
            'config_from_hub({"model_type": "llama", …}).'
        )
    return json.loads(config.hf_config)


def hub_tensors(model: Decoder) -> list[HubTensor]:
    """The tensors of a checkpoint of this model.

    Args:
      model: its config must come from `config_from_hub`.

    Returns:
      One entry per tensor, or per tensor of every layer. Each parameter is part of exactly one entry.
    """
    family, config = family_of(model.config), model.config
    modules = {name: family.base + target for name, target in family.modules.items()}
    modules |= {"lm_head": family.lm_head, "scalar_head": "score"}

    groups: dict[str, list[tuple[tuple[str, ...], tuple[int, ...]]]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(model)):
        keys = tuple(part.key for part in path)
        name = "/".join(keys)
        if name in modules:  # a bare array: an embedding table
            target = f"{modules[name]}.weight"
        else:
            target = f"{modules['/'.join(keys[:-1])]}.{'bias' if keys[-1] == 'bias' else 'weight'}"
        shape = leaf.shape[1:] if keys[0] == "layers" else leaf.shape
        if name in ("embedding/table", "lm_head/kernel"):
            shape = (config.vocab_size, *shape[1:])
        groups.setdefault(target, []).append((keys, shape))

    order = {name: index for index, name in enumerate(modules)}
    tensors = []
    for target, members in groups.items():
        members.sort(key=lambda member: order.get("/".join(member[0][:-1]), 0))  # fused: query, key, value
        leaves, shapes = zip(*members, strict=True)
        tensors.append(_hub_tensor(family, target, leaves, shapes))
    return tensors


def _hub_tensor(family: Family, name: str, leaves: tuple, shapes: tuple) -> HubTensor:
    kind, leaf = "same", leaves[0]
    if leaf[-1] == "kernel" and leaf[0] != "lm_head":
        kind = "conv1d" if family.conv1d and leaf[0] == "layers" else "linear"
    elif leaf[-1] == "bias" and "norm" not in leaf[-2]:
        kind = "bias"
    return HubTensor(
        name=name,
        leaves=leaves,
        shapes=shapes,
        kind=kind,
        inputs=2 if leaf[-2:] == ("out", "kernel") else 1,
        interleaved=family.interleaved and len(leaves) > 1,
        stacked=leaf[0] == "layers",
    )
