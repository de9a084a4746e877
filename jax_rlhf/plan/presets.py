"""Shapes of common models from their config.json files, for plans without a checkpoint."""

from typing import Any

_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_LLAMA3_ROPE = {"rope_type": "default", "rope_theta": 500_000.0}


def _config(model_type: str, sizes: tuple[int, ...], **fields: Any) -> dict[str, Any]:
    return {"model_type": model_type, **dict(zip(_SIZES, sizes, strict=True)), "torch_dtype": "bfloat16", **fields}


def _llama(*sizes: int, vocab: int = 32_000, tied: bool = False, **fields: Any) -> dict[str, Any]:
    positions = {"max_position_embeddings": 8192, "rms_norm_eps": 1e-5}
    return _config("llama", sizes, vocab_size=vocab, tie_word_embeddings=tied, **positions, **fields)


def _llama3(*sizes: int, **fields: Any) -> dict[str, Any]:
    return _llama(*sizes, vocab=128_256, rope_parameters=_LLAMA3_ROPE, **fields)


def _mistral(*sizes: int, vocab: int, window: int | None = None, **fields: Any) -> dict[str, Any]:
    positions = {"max_position_embeddings": 32_768, "sliding_window": window}
    return _config("mistral", sizes, vocab_size=vocab, tie_word_embeddings=False, **positions, **fields)


def _qwen2(*sizes: int, vocab: int = 151_936, tied: bool = False) -> dict[str, Any]:
    return _config("qwen2", sizes, vocab_size=vocab, tie_word_embeddings=tied, max_position_embeddings=32_768)


def _qwen3(*sizes: int, tied: bool = False) -> dict[str, Any]:
    positions = {"max_position_embeddings": 40_960, "head_dim": 128}
    return _config("qwen3", sizes, vocab_size=151_936, tie_word_embeddings=tied, **positions)


def _gemma2(*sizes: int, head_dim: int = 256, scale: int = 256) -> dict[str, Any]:
    fields = {"vocab_size": 256_000, "head_dim": head_dim, "query_pre_attn_scalar": scale, "sliding_window": 4096}
    return _config("gemma2", sizes, max_position_embeddings=8192, **fields)


def _gemma3(*sizes: int) -> dict[str, Any]:
    fields = {"vocab_size": 262_144, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 512}
    return _config("gemma3_text", sizes, max_position_embeddings=32_768, **fields)


def _phi3(*sizes: int, vocab: int = 32_064, **fields: Any) -> dict[str, Any]:
    return _config("phi3", sizes, vocab_size=vocab, max_position_embeddings=4096, **fields)


def _gpt2(width: int, layers: int, heads: int) -> dict[str, Any]:
    sizes = {"n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": 1024, "vocab_size": 50_257}
    return {"model_type": "gpt2", **sizes, "torch_dtype": "float32"}


def _pythia(width: int, layers: int, heads: int, *, vocab: int = 50_304) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    fields = {"num_attention_heads": heads, "vocab_size": vocab, "max_position_embeddings": 2048, "rotary_pct": 0.25}
    return {"model_type": "gpt_neox", **sizes, **fields, "torch_dtype": "float16"}


def _opt(width: int, layers: int, heads: int, **fields: Any) -> dict[str, Any]:
    sizes = {"hidden_size": width, "ffn_dim": 4 * width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {
        "model_type": "opt",
        **sizes,
        "vocab_size": 50_272,
        "max_position_embeddings": 2048,
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "word_embed_proj_dim": width,
        "torch_dtype": "float16",
        **fields,
    }


_PHI4_MINI = {"vocab": 200_064, "tie_word_embeddings": True, "partial_rotary_factor": 0.75}

# Width, MLP width, layers, heads, key/value heads.
PRESETS: dict[str, dict[str, Any]] = {
    "smollm2-135m": _llama(576, 1536, 30, 9, 3, vocab=49_152, tied=True),
    "smollm2-360m": _llama(960, 2560, 32, 15, 5, vocab=49_152, tied=True),
    "smollm2-1.7b": _llama(2048, 8192, 24, 32, 32, vocab=49_152, tied=True),
    "tinyllama-1.1b": _llama(2048, 5632, 22, 32, 4),
    "llama-2-7b": _llama(4096, 11_008, 32, 32, 32),
    "llama-2-13b": _llama(5120, 13_824, 40, 40, 40),
    "llama-2-70b": _llama(8192, 28_672, 80, 64, 8),
    "llama3.2-1b": _llama3(2048, 8192, 16, 32, 8, tied=True),
    "llama3.2-3b": _llama3(3072, 8192, 28, 24, 8, tied=True),
    "llama3-8b": _llama3(4096, 14_336, 32, 32, 8),
    "llama3-70b": _llama3(8192, 28_672, 80, 64, 8),
    "mistral-7b-v0.1": _mistral(4096, 14_336, 32, 32, 8, vocab=32_000, window=4096),
    "mistral-7b-v0.3": _mistral(4096, 14_336, 32, 32, 8, vocab=32_768),
    "mistral-nemo-12b": _mistral(5120, 14_336, 40, 32, 8, vocab=131_072, head_dim=128),
    "qwen2.5-0.5b": _qwen2(896, 4864, 24, 14, 2, tied=True),
    "qwen2.5-1.5b": _qwen2(1536, 8960, 28, 12, 2, tied=True),
    "qwen2.5-3b": _qwen2(2048, 11_008, 36, 16, 2, tied=True),
    "qwen2.5-7b": _qwen2(3584, 18_944, 28, 28, 4, vocab=152_064),
    "qwen2.5-14b": _qwen2(5120, 13_824, 48, 40, 8, vocab=152_064),
    "qwen2.5-32b": _qwen2(5120, 27_648, 64, 40, 8, vocab=152_064),
    "qwen2.5-72b": _qwen2(8192, 29_568, 80, 64, 8, vocab=152_064),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, 8, tied=True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, 8, tied=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, 8, tied=True),
    "qwen3-8b": _qwen3(4096, 12_288, 36, 32, 8),
    "qwen3-14b": _qwen3(5120, 17_408, 40, 40, 8),
    "qwen3-32b": _qwen3(5120, 25_600, 64, 64, 8),
    "gemma-2-2b": _gemma2(2304, 9216, 26, 8, 4),
    "gemma-2-9b": _gemma2(3584, 14_336, 42, 16, 8),
    "gemma-2-27b": _gemma2(4608, 36_864, 46, 32, 16, head_dim=128, scale=144),
    "gemma-3-270m": _gemma3(640, 2048, 18, 4, 1),
    "gemma-3-1b": _gemma3(1152, 6912, 26, 4, 1),
    "phi-3-mini": _phi3(3072, 8192, 32, 32, 32),
    "phi-3-medium": _phi3(5120, 17_920, 40, 40, 10),
    "phi-4-mini": _phi3(3072, 8192, 32, 24, 8, **_PHI4_MINI),
    "phi-4": _phi3(5120, 17_920, 40, 40, 10, vocab=100_352),
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "pythia-70m": _pythia(512, 6, 8),
    "pythia-160m": _pythia(768, 12, 12),
    "pythia-410m": _pythia(1024, 24, 16),
    "pythia-1b": _pythia(2048, 16, 8),
    "pythia-1.4b": _pythia(2048, 24, 16),
    "pythia-2.8b": _pythia(2560, 32, 32),
    "pythia-6.9b": _pythia(4096, 32, 32, vocab=50_432),
    "pythia-12b": _pythia(5120, 36, 40, vocab=50_688),
    "opt-125m": _opt(768, 12, 12),
    "opt-350m": _opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-2.7b": _opt(2560, 32, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "opt-13b": _opt(5120, 40, 40),
    "opt-30b": _opt(7168, 48, 56),
    "opt-66b": _opt(9216, 64, 72),
}
"""Name → the fields of config.json on which shapes depend."""
