"""Converts `config.json` to fields of `DecoderConfig`, with one function per model family.

The functions get config dicts as transformers normalises them (with `rope_parameters` and `layer_types` filled in),
independent of the version that wrote them.
"""

import math
from typing import Any

from jax_rlhf.hub.checkpoint_error import CheckpointError
from jax_rlhf.models import Rotary

Fields = dict[str, Any]


def _rotary(parameters: Fields, head_dim: int, config: Fields, *, partial: bool = False) -> Rotary:
    kind = parameters.get("rope_type", "default")
    common = {
        "theta": float(parameters["rope_theta"]),
        "dim": int(head_dim * parameters.get("partial_rotary_factor", 1.0)) if partial else head_dim,
        "kind": kind,
    }
    if kind == "default":
        return Rotary(**common)
    if kind == "linear":
        return Rotary(**common, factor=parameters["factor"])

    first = parameters.get("original_max_position_embeddings") or config["max_position_embeddings"]
    common |= {"original_max_positions": first}
    if kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor")
        return Rotary(**common, **{name: parameters[name] for name in names})
    factor = parameters.get("factor") or config["max_position_embeddings"] / first
    if kind == "yarn":
        return Rotary(
            **common,
            factor=factor,
            beta_fast=parameters.get("beta_fast") or 32.0,
            beta_slow=parameters.get("beta_slow") or 1.0,
            truncate=parameters.get("truncate", True),
            attention_factor=_yarn_attention_factor(parameters, factor),
        )
    if kind == "longrope":
        attention_factor = parameters.get("attention_factor")
        if attention_factor is None:
            attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(first))
        return Rotary(
            **common,
            attention_factor=attention_factor,
            short_factor=tuple(parameters["short_factor"]),
            long_factor=tuple(parameters["long_factor"]),
        )
    raise CheckpointError(f"rope_type {kind!r} is not supported; default, linear, llama3, yarn and longrope are.")


def _yarn_attention_factor(parameters: Fields, factor: float) -> float:
    # Peng et al. 2023, eq. 22; or DeepSeek's `mscale` and `mscale_all_dim` if both are set.
    if parameters.get("attention_factor") is not None:
        return parameters["attention_factor"]

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return mscale(parameters["mscale"]) / mscale(parameters["mscale_all_dim"])
    return mscale(1.0)


def _sliding(config: Fields) -> Fields:
    # Families without `layer_types` have the same attention in every layer (Mistral, Phi-3).
    window, count = config.get("sliding_window"), config["num_hidden_layers"]
    if window is None:
        return {}
    types = config.get("layer_types") or ["sliding_attention"] * count
    layers = tuple(kind == "sliding_attention" for kind in types)
    return {"sliding_window": window, "sliding_layers": layers} if any(layers) else {}


def _rotary_family(config: Fields, *, partial: bool = False) -> Fields:
    """The fields that Llama, Mistral, Qwen, Gemma, Phi-3 and GPT-NeoX have in common."""
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rotary = {}
    if "rope_theta" in config["rope_parameters"]:  # otherwise there is one rotation per kind of layer (Gemma 3)
        rotary = {"rotary": _rotary(config["rope_parameters"], head_dim, config, partial=partial)}
    return {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "num_kv_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
        "head_dim": head_dim,
        "max_positions": config["max_position_embeddings"],
        "attention_scale": head_dim**-0.5,
        "norm_epsilon": config.get("rms_norm_eps"),
        "activation": config.get("hidden_act"),
        "tie_embeddings": config["tie_word_embeddings"],
        "qkv_bias": config.get("attention_bias", False),
        "out_bias": config.get("attention_bias", False),
        "mlp_bias": config.get("mlp_bias", False),
        **rotary,
        **_sliding(config),
    }


def llama(config: Fields) -> Fields:
    """Llama, SmolLM2, Mistral."""
    return _rotary_family(config)


def qwen2(config: Fields) -> Fields:
    """Qwen 2 and 2.5: biases on query, key and value only."""
    return _rotary_family(config) | {"qkv_bias": True}


def qwen3(config: Fields) -> Fields:
    """Qwen 3: norms on query and key heads."""
    return _rotary_family(config) | {"qk_norm": True}


def phi3(config: Fields) -> Fields:
    """Phi-3 and 3.5, Phi-4-mini."""
    return _rotary_family(config, partial=True)


def gemma2(config: Fields) -> Fields:
    """Gemma 2."""
    if config.get("use_bidirectional_attention"):
        raise CheckpointError("use_bidirectional_attention is not supported: this is a causal decoder.")
    return _rotary_family(config) | {
        "attention_scale": config["query_pre_attn_scalar"] ** -0.5,
        "attention_softcap": config["attn_logit_softcapping"],
        "logit_softcap": config["final_logit_softcapping"],
        "norm_placement": "both",
        "norm_plus_one": True,
        "activation": config["hidden_activation"],
        "embedding_scale": config["hidden_size"] ** 0.5,
    }


def gemma3(config: Fields) -> Fields:
    """Gemma 3's text models."""
    fields = gemma2(config)
    # Gemma 3's config in transformers still has Gemma 2's softcap, but does not apply it to attention scores.
    fields |= {"qk_norm": True, "attention_softcap": None}
    rotary = {
        kind: _rotary(config["rope_parameters"][kind], fields["head_dim"], config)
        for kind in ("full_attention", "sliding_attention")
    }
    return fields | {"rotary": rotary["full_attention"], "local_rotary": rotary["sliding_attention"]}


def gpt2(config: Fields) -> Fields:
    """GPT-2."""
    if config.get("add_cross_attention"):
        raise CheckpointError("add_cross_attention is not supported: this is a decoder without an encoder.")
    hidden, heads = config["n_embd"], config["n_head"]
    return {
        "vocab_size": config["vocab_size"],
        "hidden_size": hidden,
        "intermediate_size": config["n_inner"] or 4 * hidden,
        "num_layers": config["n_layer"],
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": hidden // heads,
        "max_positions": config["n_positions"],
        "position_kind": "learned",
        "attention_scale": (hidden // heads) ** -0.5 if config["scale_attn_weights"] else 1.0,
        "scale_by_layer": config["scale_attn_by_inverse_layer_idx"],
        "norm_kind": "layer",
        "norm_epsilon": config["layer_norm_epsilon"],
        "activation": config["activation_function"],
        "gated_mlp": False,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "tie_embeddings": config["tie_word_embeddings"],
    }


def gpt_neox(config: Fields) -> Fields:
    """GPT-NeoX and Pythia."""
    return _rotary_family(config, partial=True) | {
        "norm_kind": "layer",
        "norm_epsilon": config["layer_norm_eps"],
        "gated_mlp": False,
        "mlp_bias": True,
        "parallel_residual": config["use_parallel_residual"],
    }


def opt(config: Fields) -> Fields:
    """OPT; opt-350m normalizes after each block and projects its embedding."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    embedding, before = config["word_embed_proj_dim"], config["do_layer_norm_before"]
    return {
        "vocab_size": config["vocab_size"],
        "hidden_size": hidden,
        "embedding_size": embedding if embedding != hidden else None,
        "intermediate_size": config["ffn_dim"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": hidden // heads,
        "max_positions": config["max_position_embeddings"],
        "position_kind": "learned",
        "position_offset": 2,
        "attention_scale": (hidden // heads) ** -0.5,
        "norm_kind": "layer",
        "norm_epsilon": 1e-5,
        "norm_placement": "before" if before else "after",
        "norm_affine": config["layer_norm_elementwise_affine"],
        "final_norm": before and not config["_remove_final_layer_norm"],
        "activation": config["activation_function"],
        "gated_mlp": False,
        "qkv_bias": config["enable_bias"],
        "out_bias": config["enable_bias"],
        "mlp_bias": config["enable_bias"],
        "tie_embeddings": config["tie_word_embeddings"],
    }
