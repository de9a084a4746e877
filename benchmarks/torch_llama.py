"""Shared code of the two torch scripts. It runs in an environment with only torch, transformers and TRL."""

from transformers import LlamaConfig


def llama_config(shape: dict, **changes: object) -> LlamaConfig:
    """A benchmark's shape as a transformers config, without EOS.

    Args:
      shape: the fields of `benchmarks.shapes.Shape`.
      changes: other fields of the config.

    Returns:
      The config.
    """
    return LlamaConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_heads"],
        eos_token_id=None,
        bos_token_id=None,
        **changes,
    )
