"""Makes transformers' tokenizers from the files beside a checkpoint, or from the fields of a GGUF file.

transformers can build one from a GGUF file too (5.23: `integrations/gguf`), but only if torch is installed, and without
the digit splitting with which SmolLM was trained.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from absl import logging
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from jax_rlhf.hub.checkpoint_error import CheckpointError
from jax_rlhf.hub.limits import MOST_IDS
from jax_rlhf.hub.vocabulary import check_files, check_tokens
from jax_rlhf.io.json_files import JSONFileError, read_object
from jax_rlhf.io.paths import lies_within

_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_INLINE = ("vocab", "merges", "tokenizer_object")
_NO_SIZES = ("_id", "_index", "max_length", "max_len", "vocab_size")  # ids, and lengths, which are often 10³⁰
_LARGEST_SETTING = 10_000  # some classes add as many tokens as a setting says; T5's adds 100
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json")

# `tokenizer.ggml.pre` names the pre-tokenizer; these patterns are from the tokenizer.json of the original models.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "smaug-bpe", "dbrx", "pixtral"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _LLAMA3.replace("{1,3}", "")),
    "tekken": _TEKKEN,
}
_WHOLE_TOKENS_FIRST = (
    "llama-bpe",
    "llama3",
    "llama-v3",
    "tekken",
    "pixtral",
)  # whole words are looked up before merges
_DIGITS_APART = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
_GPT2 = (None, "default", "gpt-2", "olmo", "phi-2", "mpt", "jais", "trillion")
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # llama.cpp's token types


def end_ids(
    tokenizer: PreTrainedTokenizerBase | None, generation_config: Mapping[str, Any] | None = None
) -> tuple[int, ...]:
    """The ids of tokens that end an answer: EOS, and an instruction-tuned model's end of turn if it is another token.

    Args:
      tokenizer: its EOS is included; or None.
      generation_config: the checkpoint's; its `eos_token_id` is one id or several.

    Returns:
      The ids, those of the checkpoint first; () if there are none.
    """
    stored = (generation_config or {}).get("eos_token_id")
    stored = stored if isinstance(stored, list) else [stored]
    ids = (*stored, getattr(tokenizer, "eos_token_id", None))
    return tuple(dict.fromkeys(index for index in ids if index is not None))


class _WithTokenizer(Protocol):
    """A policy, the description of its checkpoint, or an engine."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Its tokenizer."""
        ...

    @property
    def generation_config(self) -> Mapping[str, Any] | None:
        """The checkpoint's generation_config."""
        ...


def response_end_ids(policy: _WithTokenizer, eos_ids: tuple[int, ...] | None) -> tuple[int, ...]:
    """The tokens that end the policy's responses, in all phases.

    Args:
      policy: the policy, its checkpoint's description, or the engine.
      eos_ids: the setting `ppo.sampling.eos_ids`; None = those of `end_ids`.
    """
    return end_ids(policy.tokenizer, policy.generation_config) if eos_ids is None else eos_ids


def tokenizer_of(model: _WithTokenizer) -> PreTrainedTokenizerBase:
    """A model's tokenizer.

    Raises:
      CheckpointError: its checkpoint has none.
    """
    if model.tokenizer is None:
        raise CheckpointError("the checkpoint has no tokenizer, which is needed here; copy one into its folder.")
    return model.tokenizer


def decode(tokenizer: PreTrainedTokenizerBase, ids: Any, *, skip_special_tokens: bool = True) -> str:
    """The text of token ids, int[T]."""
    return str(tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))


def ids_of(tokenizer: PreTrainedTokenizerBase) -> tuple[int, tuple[int, ...]]:
    """Which ids are tokens. Embeddings often have more rows (Qwen's, for one), and these ids decode to nothing.

    Returns:
      (size, absent): `size` is the largest id of a token + 1, and `absent` are the ids below it without a token.
    """
    ids = set(tokenizer.get_vocab().values())
    size = max(ids) + 1
    return size, tuple(index for index in range(size) if index not in ids) if size > len(ids) else ()


def other_ids(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str | None:
    """Compares ids of a tokenizer's tokens with those of another model's tokenizer, which may have further tokens.

    Args:
      tokenizer: the tokenizer whose ids are passed to the other model.
      other: the other model's tokenizer.

    Returns:
      None if every token has the same id in both; otherwise a description of the differences, for a message.
    """
    vocab, other_vocab = tokenizer.get_vocab(), other.get_vocab()
    wrong = sorted((index, token) for token, index in vocab.items() if other_vocab.get(token) != index)
    if not wrong:
        return None
    index, token = wrong[0]
    there = f"{other_vocab[token]} there" if token in other_vocab else "not in its vocabulary"
    return f"{len(wrong):,} of {len(vocab):,} tokens differ, first {token!r}: {index} here, {there}"


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a local checkpoint folder; None if the folder has no tokenizer files.

    Raises:
      CheckpointError: transformers cannot read the tokenizer files.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    check_files(folder)
    for file in (folder / name for name in _SETTINGS if (folder / name).is_file()):
        try:
            content = read_object(file)  # it must be valid, because it is written again with the model
        except JSONFileError as error:
            raise CheckpointError(f"{file}: {error}; copy or download it again.") from error
        if file.name == _SETTINGS[0]:
            _check_settings(content, file)
    for file in (*folder.glob("*.jinja"), *folder.glob("additional_chat_templates/*")):
        _check_own_file(folder, file)
    try:
        with panics_as_errors():
            tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
            return _checked(tokenizer)
    except Exception as error:  # transformers and tokenizers raise many types, bare Exception among them
        raise CheckpointError(f"{folder}: its tokenizer cannot be read: {type(error).__name__}: {error}") from error


def _check_settings(content: Mapping[str, Any], file: Path) -> None:
    """Raises if a tokenizer's settings name files outside of the folder, or have implausible sizes."""
    for name, value in content.items():
        if name in _INLINE:
            raise CheckpointError(f"{file}: {name} must not be set there; it belongs in a separate file.")
        if name.endswith("_file") and isinstance(value, str) and _exists(value):
            _check_own_file(file.parent, Path(value))
        is_size = not isinstance(value, bool) and not name.endswith(_NO_SIZES)
        if is_size and isinstance(value, int) and abs(value) > _LARGEST_SETTING:
            raise CheckpointError(f"{file}: {name}={value} is not plausible; at most {_LARGEST_SETTING:,} is allowed.")


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # not a valid file name
        return False


def _check_own_file(folder: Path, file: Path) -> None:
    """Raises if a file, whose content would be saved with the model, is outside of the checkpoint's folder."""
    if not lies_within(folder, file):
        raise CheckpointError(f"{folder}: {file} is in {file.resolve().parent}; copy it into the folder.")


@contextlib.contextmanager
def panics_as_errors() -> Iterator[None]:
    """Converts panics of the tokenizers library, which are BaseExceptions, to ValueError.

    Raises:
      ValueError: the library panicked.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the tokenizers library panicked: {error}") from error


def _checked(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer; ValueError if it has no tokens, implausible ids, or a chat template that is not a text."""
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if not 0 <= largest < MOST_IDS:
        raise ValueError(f"its largest id is {largest}; it must be from 0 to {MOST_IDS - 1:,}")
    template = tokenizer.chat_template
    texts = list(template.values()) if isinstance(template, dict) else [template]
    if not all(text is None or isinstance(text, str) for text in texts):
        raise ValueError(f"its chat template is a {type(template).__name__}; it must be a text")
    tokenizer("a")  # fails if there is no token for unknown characters
    return tokenizer


def gguf_tokenizer(fields: Mapping[str, Any], file: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer and chat template of a GGUF file; None if it has none.

    Args:
      fields: the file's metadata under "tokenizer.", without that prefix ("ggml.tokens", "chat_template", …).
      file: the GGUF file, for error messages.

    Raises:
      CheckpointError: the kind of tokenizer is not supported, or its fields contradict each other.
    """
    kind = fields.get("ggml.model")
    if kind is None:
        return None
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in builders:
        raise CheckpointError(
            f"{file}: tokenizer.ggml.model {kind!r} is not supported; {', '.join(builders)} are. "
            "Use the safetensors checkpoint."
        )
    try:
        with panics_as_errors():
            tokenizer = builders[kind](fields, file)
            added = _typed(fields, _CONTROL), _typed(fields, _USER_DEFINED)
            for tokens, special in zip(added, (True, False), strict=True):
                named = [AddedToken(token, normalized=False, special=special) for token in tokens]
                tokenizer.add_tokens(named)  # pyright: ignore[reportArgumentType] -- transformers' name for the same class
            _checked(tokenizer)
    except CheckpointError:
        raise
    except Exception as error:  # tokenizers raises many types, bare Exception among them
        raise CheckpointError(f"{file}: its tokenizer cannot be read: {type(error).__name__}: {error}") from error
    return tokenizer


def _byte_level(fields: Mapping[str, Any], file: Path) -> PreTrainedTokenizerBase:
    split = fields.get("ggml.pre")
    merges = [tuple(merge.split(" ")) for merge in fields["ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(_vocabulary(fields), merges, ignore_merges=split in _WHOLE_TOKENS_FIRST))
    tokenizer.pre_tokenizer = _pre_tokenizer(split, file)
    tokenizer.decoder = decoders.ByteLevel()
    return _finished(tokenizer, fields, add_bos=split in ("llama-bpe", "llama3", "llama-v3"))


def _pre_tokenizer(split: str | None, file: Path) -> pre_tokenizers.PreTokenizer:
    as_gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split in _PATTERNS:
        pattern = pre_tokenizers.Split(Regex(_PATTERNS[split]), behavior="isolated")
        whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([pattern, whole])
    if split in _DIGITS_APART:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), as_gpt2])
    if split not in _GPT2:
        logging.warning(
            "%s: tokenizer.ggml.pre=%r is unknown; text is split as for GPT-2, so some token ids may differ from those "
            "with which the model was trained.",
            file,
            split,
        )
    return as_gpt2


def _sentencepiece(fields: Mapping[str, Any], file: Path) -> PreTrainedTokenizerBase:
    vocabulary = _vocabulary(fields)
    if "ggml.merges" in fields:
        merges = [tuple(merge.split(" ")) for merge in fields["ggml.merges"]]
    else:  # the score of a token is the rank of the merge that makes it
        check_tokens(fields["ggml.tokens"], str(file))
        scores = dict(zip(fields["ggml.tokens"], fields["ggml.scores"], strict=True))
        skipped = {token for kind in (_UNKNOWN, _CONTROL, _BYTE) for token in _typed(fields, kind)}
        merges = generate_merges(vocabulary, scores, skipped)
    unknown = _special_tokens(fields).get("unk_token")
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if fields.get("ggml.add_space_prefix", True):
        spaces = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        parts.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer, tokenizer.decoder = spaces, decoders.Sequence(parts)
    return _finished(tokenizer, fields, add_bos=True)


def _vocabulary(fields: Mapping[str, Any]) -> dict[str, int]:
    return {token: index for index, token in enumerate(fields["ggml.tokens"])}


def _finished(tokenizer: Tokenizer, fields: Mapping[str, Any], *, add_bos: bool) -> PreTrainedTokenizerBase:
    """The tokenizer, adding BOS and EOS as the file says, or else by llama.cpp's defaults for its kind."""
    special = _special_tokens(fields)
    bos, eos = special.get("bos_token"), special.get("eos_token")
    before = [bos] if bos and fields.get("ggml.add_bos_token", add_bos) else []
    after = [eos] if eos and fields.get("ggml.add_eos_token", False) else []
    if before or after:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *before, "$B", *after],
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in {*before, *after}],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=fields.get("chat_template"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _special_tokens(fields: Mapping[str, Any]) -> dict[str, str]:
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: fields.get(f"ggml.{key}_token_id") for name, key in names.items()}
    return {name: fields["ggml.tokens"][index] for name, index in ids.items() if index is not None}


def _typed(fields: Mapping[str, Any], kind: int) -> list[str]:
    types = fields.get("ggml.token_type") or []
    return [token for token, found in zip(fields["ggml.tokens"], types, strict=False) if found == kind]
