"""Keeps the text of a special token in a row apart from the token: "<|im_end|>" in a row must not end a turn.

Hugging Face tokenizers convert the text of a special token to the token wherever it occurs. A prompt could so open a
turn of the system, and an answer that mentions EOS would end there. Therefore:

1. Before a chat template renders a row, `marked` replaces the text of each special token in the row by a mark and a
   number. Special tokens that the template itself writes have no marks, and stay special tokens.
2. `token_ids` tokenizes the marked text with a copy of the tokenizer in which every special token has a secret name.
   The special tokens in the text are replaced by their secret names, and the marks by the original texts, which the
   copy tokenizes as ordinary text.
"""

import functools
import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from jax_rlhf.data.data_error import DataError
from jax_rlhf.hub.tokenizer import panics_as_errors

MARK = "\ufdd0"
"""A noncharacter, which Unicode reserves for internal use; if a row contains it, it is marked like a special token."""
_FIRST, _MOST = 0xF0000, 0xFFFE  # the private-use characters that encode numbers: the first, and how many
_MARKED = re.compile(f"{MARK}(.?)", re.DOTALL)
_ESCAPED = re.compile(r"\\u(?:fdd0|dbb?[89a-f][0-9a-f])|\\U000f[0-9a-f]{4}", re.IGNORECASE)
_BEGIN, _TAIL = re.compile(r"^\W+"), re.compile(r"\W+$")
_CONTROL = re.compile(r"<[|｜][^\s<>]{1,60}[|｜]>|<(?:start|end)_of_turn>|\[/?INST\]")
"""Added tokens that are treated as special even if the tokenizer adds them as ordinary ones, as some do with ChatML."""
_THOUGHTS = re.compile(r"</?(?:think|thinking|thought|reasoning)>")
"""Tokens that are not treated as special: data sets write them in the text of answers."""
_NEVER = "(?!)"  # a pattern that never matches
_END = ""  # key of the end of a text in a tree of characters
_DEEPEST = 80  # characters; about the deepest nesting of groups that Python's patterns allow
_CHARACTERS_AT_ONCE = 4_000_000
"""Characters per call of the tokenizer: an encoding takes about 100 bytes per token."""


class _Special(NamedTuple):
    """The mark and a tokenizer's special tokens.

    Attributes:
      insides: inner part of a special token → the token's text.
      numbers: text → number, its index in `texts`.
      texts: the mark and the special tokens.
      pattern: finds any of the texts, the longest first.
    """

    insides: Mapping[str, str]
    numbers: Mapping[str, int]
    texts: tuple[str, ...]
    pattern: re.Pattern


def marked(value: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Marks the texts of special tokens in a value of a row.

    Args:
      value: a text, or any JSON value, of which all strings are marked.
      tokenizer: has the special tokens.

    Returns:
      The value with marks.
    """
    return _marked(value, _special(tokenizer))


def _marked(value: Any, special: _Special) -> Any:
    if isinstance(value, str):
        return special.pattern.sub(lambda found: MARK + chr(_FIRST + special.numbers[found[0]]), value)
    if isinstance(value, Mapping):
        return {_marked(key, special): _marked(inner, special) for key, inner in value.items()}
    return [_marked(inner, special) for inner in value] if isinstance(value, list | tuple) else value


def marked_text(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Marks the texts of special tokens in a plain text, except a leading BOS if the tokenizer itself adds BOS.

    Args:
      text: a text of a row.
      tokenizer: has the special tokens.

    Returns:
      The text with marks.
    """
    bos = cast(str | None, tokenizer.bos_token)
    begin = bos if bos and text.startswith(bos) and begins_with_bos(tokenizer) else ""
    return begin + marked(text[len(begin) :], tokenizer)


def without_marks(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The original of a marked text.

    Args:
      text: a text with marks.
      tokenizer: has the special tokens.
    """
    texts = _special(tokenizer).texts
    if MARK not in text:
        return text

    def original(found: re.Match) -> str:
        number = ord(found[1]) - _FIRST if found[1] else -1
        return texts[number] if 0 <= number < len(texts) else found[1]

    return _MARKED.sub(original, text)


def first_special(value: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of the first special token that occurs in a value of a row; "" if there is none.

    Args:
      value: a text without marks, or any JSON value.
      tokenizer: has the special tokens.
    """
    return _first_special(value, _special(tokenizer))


def _first_special(value: Any, special: _Special) -> str:
    if isinstance(value, str):
        found = special.pattern.search(value)
        return found[0] if found else ""
    inner = (*value, *value.values()) if isinstance(value, Mapping) else value
    if not isinstance(inner, list | tuple):
        return ""
    return next(filter(None, (_first_special(one, special) for one in inner)), "")


def special_around(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The special token of which a text is the inner part, such as "<|im_end|>" for "im_end"; "" if there is none.

    A template that puts `<|` and `|>` around the text would write the token.

    Args:
      text: a text without marks.
      tokenizer: has the special tokens.
    """
    return _special(tokenizer).insides.get(text.strip(), "")


def check_marks(text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks that a template has not changed marks.

    Args:
      text: the rendered text.
      tokenizer: has the special tokens.

    Raises:
      ValueError: the template has separated a mark from its number, or escaped it.
    """
    last = chr(_FIRST + len(_special(tokenizer).texts) - 1)
    if any(not chr(_FIRST) <= number <= last for number in _MARKED.findall(text)) or _ESCAPED.search(text):
        raise ValueError("it splits or escapes the text of a special token in the row, such as <|im_end|>")


def begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer adds BOS before a text."""
    first = tokenizer("a")["input_ids"][:1]
    return bool(first) and first[0] == tokenizer.bos_token_id


def token_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokenizes texts, without adding special tokens.

    Args:
      texts: the text of a special token is tokenized as the token, unless it is marked.
      tokenizer: a fast tokenizer.

    Returns:
      The ids of each text.

    Raises:
      DataError: the tokenizers library fails.
    """
    ids: list[list[int]] = [[] for _ in texts]
    apart = _normalizes_special(tokenizer, len(tokenizer))
    plain = [index for index, text in enumerate(texts) if MARK not in text and not apart]
    with_marks = [index for index, text in enumerate(texts) if MARK in text or apart]
    try:
        with panics_as_errors():
            for some in _groups(texts, plain):
                found = tokenizer([texts[index] for index in some], add_special_tokens=False)["input_ids"]
                for index, one in zip(some, found, strict=True):
                    ids[index] = one
            renamed = _renamed(tokenizer, _special(tokenizer).texts) if with_marks else None
            for some in _groups(texts, with_marks):
                assert renamed is not None  # only texts with marks have groups
                renamed_texts = [_with_names(texts[index], renamed, tokenizer) for index in some]
                found = renamed.tokenizer.encode_batch(renamed_texts, add_special_tokens=False)
                for index, one in zip(some, found, strict=True):
                    ids[index] = one.ids
    except DataError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"the tokenizer fails on a text: {type(error).__name__}: {str(error)[:300]}") from error
    return ids


@functools.lru_cache(maxsize=4)
def _normalizes_special(tokenizer: PreTrainedTokenizerBase, size: int) -> bool:
    """Whether the normalizer may turn other texts into special tokens, such as full-width or capital letters.

    Then all texts are tokenized like texts with marks, if that gives the special tokens of a template the same ids.
    """
    del size  # part of the cache key: tokens may have been added to the tokenizer
    content = json.loads(cast(Any, tokenizer.backend_tokenizer).to_str())
    texts = _special(tokenizer).numbers
    normalized = [one["content"] for one in content["added_tokens"] if one["normalized"] and one["content"] in texts]
    if not normalized or content["normalizer"] is None:
        return False
    tries = [f"a{text}b {text}\nc" for text in normalized]
    renamed = _renamed(tokenizer, _special(tokenizer).texts)
    renamed_texts = [_with_names(text, renamed, tokenizer) for text in tries]
    found = [one.ids for one in renamed.tokenizer.encode_batch(renamed_texts, add_special_tokens=False)]
    return found == tokenizer(tries, add_special_tokens=False)["input_ids"]


def _groups(texts: Sequence[str], indices: Sequence[int]) -> list[list[int]]:
    """The indices in order, in groups of limited total length."""
    groups: list[list[int]] = []
    room = 0
    for index in indices:
        if not groups or len(texts[index]) > room:
            groups.append([])
            room = _CHARACTERS_AT_ONCE
        groups[-1].append(index)
        room -= len(texts[index])
    return groups


# ---- a tokenizer's special tokens ----------------------------------------------------------------------------------


def _special(tokenizer: PreTrainedTokenizerBase) -> _Special:
    return _special_of(tokenizer, len(tokenizer), tuple(tokenizer.all_special_tokens))


@functools.lru_cache(maxsize=4)
def _special_of(tokenizer: PreTrainedTokenizerBase, size: int, named: tuple[str, ...]) -> _Special:
    del size  # part of the cache key: tokens may have been added to the tokenizer
    texts = {str(token) for token in named}
    for token in tokenizer.added_tokens_decoder.values():
        if token.special or _CONTROL.fullmatch(token.content):
            texts.add(token.content)
    vocab = tokenizer.get_vocab()
    texts = {text for text in texts if text and text in vocab and not _THOUGHTS.fullmatch(text)}
    ordered = [MARK, *sorted(texts - {MARK}, key=lambda text: (-len(text), text))]  # the longest is matched first
    if len(ordered) > _MOST:
        raise DataError(f"the tokenizer has {len(texts):,} special tokens; at most {_MOST:,} are supported.")
    numbers = {text: number for number, text in enumerate(ordered)}
    insides = {inner: text for text in ordered for inner in _insides(text)}
    return _Special(insides, numbers, tuple(ordered), _pattern_of(ordered))


def _insides(text: str) -> Iterator[str]:
    """The inner parts of a special token: for <|a|> they are |a|, |a, a| and a."""
    begin, end = (len(found[0]) if (found := pattern.search(text)) else 0 for pattern in (_BEGIN, _TAIL))
    for first in range(1, min(begin, len(text)) + 1):
        yield from (text[first : len(text) - last] for last in range(1, end + 1) if first + last < len(text))


def _pattern_of(texts: Sequence[str]) -> re.Pattern:
    """A pattern that finds the longest of the texts. Common beginnings are merged, as there may be thousands."""
    if max(map(len, texts), default=0) > _DEEPEST:
        return re.compile("|".join(map(re.escape, texts)) or _NEVER)  # the longest come first
    tree: dict[str, Any] = {}
    for text in texts:
        node = tree
        for character in text:
            node = node.setdefault(character, {})
        node[_END] = {}

    def as_pattern(node: dict[str, Any]) -> str:
        branches = [re.escape(character) + as_pattern(inner) for character, inner in node.items() if character != _END]
        if not branches:
            return ""
        one = len(branches) == 1 and _END not in node
        return branches[0] if one else f"(?:{'|'.join(branches)}){'?' if _END in node else ''}"

    return re.compile(as_pattern(tree) or _NEVER)


class _Renamed(NamedTuple):
    """A copy of a tokenizer in which every special token has a secret name.

    Attributes:
      tokenizer: the copy.
      names: text of a special token → its secret name.
      pattern: finds the texts of special tokens.
    """

    tokenizer: Tokenizer
    names: Mapping[str, str]
    pattern: re.Pattern


def _with_names(text: str, renamed: _Renamed, tokenizer: PreTrainedTokenizerBase) -> str:
    """A marked text with secret names in place of its special tokens, and original texts in place of its marks."""
    return without_marks(renamed.pattern.sub(lambda found: renamed.names[found[0]], text), tokenizer)


@functools.lru_cache(maxsize=4)
def _renamed(tokenizer: PreTrainedTokenizerBase, special: tuple[str, ...]) -> _Renamed:
    secret = secrets.token_hex(8)  # no row can contain it; the ids do not depend on it
    texts = [text for text in special if text != MARK]
    names = {text: f"\ufdd1{secret}-{number}\ufdd1" for number, text in enumerate(texts)}
    content = json.loads(cast(Any, tokenizer.backend_tokenizer).to_str())
    content |= {"padding": None, "truncation": None, "post_processor": None}
    for token in content["added_tokens"]:
        if token["content"] in names:
            token |= {"content": names[token["content"]], "normalized": False}
    model = content["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(text, text): index for text, index in model["vocab"].items()}
    else:  # Unigram: a list of (text, score)
        model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:  # a merge must not refer to a token that now has another name
        pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
        kept = [names.keys().isdisjoint((one, other, one + other)) for one, other in pairs]
        model["merges"] = [merge for merge, keep in zip(model["merges"], kept, strict=True) if keep]
    renamed = Tokenizer.from_str(json.dumps(content))
    wrong = [text for text in texts if renamed.token_to_id(names[text]) != tokenizer.convert_tokens_to_ids(text)]
    if wrong:
        raise DataError(
            f"a row contains the text {wrong[0]!r}, which this tokenizer cannot keep apart from the special token; "
            "remove it from the rows, or tokenize it as the token with --config.data.parse_special_tokens=true"
        )
    return _Renamed(renamed, names, _pattern_of(texts))
