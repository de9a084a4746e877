"""Tokenizers: transformers' own, from the files beside a checkpoint or from inside a GGUF file."""

from pathlib import Path

from absl import logging
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from jax_rlhf.hub.errors import CheckpointError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json")

# Byte-level vocabularies that split text as GPT-2 did, which is what transformers falls back to.
_SPLIT_AS_GPT2 = ("default", "gpt-2", "olmo", "phi-2", "mpt", "jais", "trillion")
# SmolLM's and its kin: every digit by itself first, then GPT-2's split.
_DIGITS_APART = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a checkpoint folder.

    Args:
      folder: a local folder.

    Returns:
      The tokenizer, or None where the folder has no tokenizer files.

    Raises:
      CheckpointError: there are such files, but transformers cannot read them.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise many types, bare Exception among them
        raise CheckpointError(f"{folder}: its tokenizer cannot be read: {type(error).__name__}: {error}") from error


def load_gguf_tokenizer(file: Path, split: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer and chat template inside a GGUF file.

    Args:
      file: the GGUF file.
      split: the file's `tokenizer.ggml.pre`: how text is cut before byte-level merging.

    Returns:
      The tokenizer.

    Raises:
      CheckpointError: transformers cannot read it.
    """
    try:
        # Not through AutoTokenizer, which would parse the whole file a second time only to see its architecture.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(
            str(file.parent), gguf_file=file.name, local_files_only=True
        )
    except Exception as error:  # as above
        raise CheckpointError(f"{file}: its tokenizer cannot be read: {type(error).__name__}: {error}") from error
    if split in _DIGITS_APART:
        # transformers 5.23 takes GPT-2's split alone here, which differs where spaces stand before a number.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif split is not None and split not in GGUF_PRE_TOKENIZER_SPLITS and split not in _SPLIT_AS_GPT2:
        logging.warning(
            "%s: tokenizer.ggml.pre=%r is not known; text is split as GPT-2 does, so some token ids may differ from "
            "those the model was trained on.",
            file,
            split,
        )
    return tokenizer
