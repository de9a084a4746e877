"""Tokenizers: transformers' own, from the files beside a checkpoint or from the fields of a GGUF file.

transformers can build one from a GGUF file too (5.23: `integrations/gguf`), but only where torch is installed, and
without the digit splitting that SmolLM was trained with.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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
_NO_SIZES = ("_id", "_index", "max_length", "max_len", "vocab_size")  # ids, and lengths that are often 10³⁰
_LARGEST_SETTING = 10_000  # some classes make so many tokens; T5's has 100
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json")

# `tokenizer.ggml.pre` names how text is cut before merging; the patterns are those of the models' own tokenizer.json.
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
_WHOLE_TOKENS_FIRST = ("llama-bpe", "llama3", "llama-v3", "tekken", "pixtral")  # a known piece is taken before merging
_DIGITS_APART = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
_GPT2 = (None, "default", "gpt-2", "olmo", "phi-2", "mpt", "jais", "trillion")
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # llama.cpp's token types


def end_ids(
    tokenizer: PreTrainedTokenizerBase | None, generation_config: Mapping[str, Any] | None = None
) -> tuple[int, ...]:
    """The tokens that end an answer: EOS, and an instruction-tuned model's end of turn where that is another one.

    Args:
      tokenizer: knows one, or None.
      generation_config: of the checkpoint: its `eos_token_id` is one or several.

    Returns:
      Ids, the checkpoint's first; () where none is known.
    """
    stored = (generation_config or {}).get("eos_token_id")
    stored = stored if isinstance(stored, list) else [stored]
    ids = (*stored, getattr(tokenizer, "eos_token_id", None))
    return tuple(dict.fromkeys(index for index in ids if index is not None))


def ids_of(tokenizer: PreTrainedTokenizerBase) -> tuple[int, tuple[int, ...]]:
    """Which ids are tokens. Embeddings often have more rows (Qwen's, for one): those ids decode to nothing.

    Args:
      tokenizer: a tokenizer.

    Returns:
      (size, absent): all tokens have ids below `size`, which is the least such number, and those of `absent` are none.
    """
    ids = set(tokenizer.get_vocab().values())
    size = max(ids) + 1
    return size, tuple(index for index in range(size) if index not in ids) if size > len(ids) else ()


def other_ids(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str | None:
    """Whether another model's tokenizer gives some token of ours another id; it may have more tokens.

    Args:
      tokenizer: whose ids are carried to the other model.
      other: that model's.

    Returns:
      None where all ids mean the same there; else the first token that does not, for a message.
    """
    ours, theirs = tokenizer.get_vocab(), other.get_vocab()
    wrong = sorted((index, token) for token, index in ours.items() if theirs.get(token) != index)
    if not wrong:
        return None
    index, token = wrong[0]
    there = f"{theirs[token]} there" if token in theirs else "not in its vocabulary"
    return f"{len(wrong):,} of {len(ours):,} tokens differ, first {token!r}: {index} here, {there}"


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
    check_files(folder)
    for file in (folder / name for name in _SETTINGS if (folder / name).is_file()):
        try:
            content = read_object(file)  # what it holds is written again with the model
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
    """Raises where the settings of a tokenizer name files elsewhere, or are of sizes that no tokenizer has."""
    for name, value in content.items():
        if name in _INLINE:
            raise CheckpointError(f"{file}: {name} is read from files of its own, not from there.")
        if name.endswith("_file") and isinstance(value, str) and _exists(value):
            _check_own_file(file.parent, Path(value))
        is_size = not isinstance(value, bool) and not name.endswith(_NO_SIZES)
        if is_size and isinstance(value, int) and abs(value) > _LARGEST_SETTING:
            raise CheckpointError(f"{file}: {name}={value} is not believable; up to {_LARGEST_SETTING:,} is read.")


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # no file can be called so
        return False


def _check_own_file(folder: Path, file: Path) -> None:
    """Raises where a file whose text is taken over lies outside a checkpoint's folder."""
    if not lies_within(folder, file):
        raise CheckpointError(f"{folder}: {file} lies in {file.resolve().parent}; copy it into the folder.")


@contextlib.contextmanager
def panics_as_errors() -> Iterator[None]:
    """Where the tokenizers library panics, which is a BaseException that nobody expects, ValueError is raised.

    Yields:
      Nothing.

    Raises:
      ValueError: it did.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the tokenizers library panicked: {error}") from error


def _checked(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer that can be used: it has tokens, with believable ids, and a text as its chat template."""
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if not 0 <= largest < MOST_IDS:
        raise ValueError(f"its largest id is {largest}; from 0 to {MOST_IDS - 1:,} are read")
    template = tokenizer.chat_template
    texts = list(template.values()) if isinstance(template, dict) else [template]
    if not all(text is None or isinstance(text, str) for text in texts):
        raise ValueError(f"its chat template is a {type(template).__name__}; a text is expected")
    tokenizer("a")  # one that has no token for unknown characters fails here
    return tokenizer


def gguf_tokenizer(fields: Mapping[str, Any], file: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer and chat template inside a GGUF file.

    Args:
      fields: the file's metadata under "tokenizer.", without that prefix ("ggml.tokens", "chat_template", …).
      file: the GGUF file, for messages.

    Returns:
      The tokenizer, or None where the file holds none.

    Raises:
      CheckpointError: it is of a kind that is not supported, or its fields contradict each other.
    """
    kind = fields.get("ggml.model")
    if kind is None:
        return None
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in builders:
        raise CheckpointError(
            f"{file}: tokenizer.ggml.model {kind!r} is not supported; {', '.join(builders)} are. "
            "Take the safetensors form."
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
    except Exception as error:  # as above
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
            "%s: tokenizer.ggml.pre=%r is not known; text is split as GPT-2 does, so some token ids may differ from "
            "those the model was trained on.",
            file,
            split,
        )
    return as_gpt2


def _sentencepiece(fields: Mapping[str, Any], file: Path) -> PreTrainedTokenizerBase:
    vocabulary = _vocabulary(fields)
    if "ggml.merges" in fields:
        merges = [tuple(merge.split(" ")) for merge in fields["ggml.merges"]]
    else:  # a piece's score is the rank of the merge that makes it
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
    """With BOS and EOS where the file asks for them, or else llama.cpp's default for the kind."""
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
