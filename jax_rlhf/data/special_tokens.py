"""Text is text: what a row says of <|im_end|> is not the token that ends a turn.

Tokenizers of Hugging Face take a special token's text for the token, wherever it stands: a prompt could open a turn of
the system, and an answer that mentions EOS would end there. So what rows say is written with marks (`marked`) before a
chat template is filled in with it: a special token's text becomes a mark and a number. What the template itself writes
has no marks, and stays what it is. `token_ids` gives a marked text its tokens: its special tokens are found under names
that nobody can guess, by a tokenizer that knows them by these alone, and the texts behind the marks are texts to it.
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
"""A code point that Unicode keeps out of texts; a row's own is marked too."""
_FIRST, _MOST = 0xF0000, 0xFFFE  # of the private characters that stand for numbers
_MARKED = re.compile(f"{MARK}(.?)", re.DOTALL)
_ESCAPED = re.compile(r"\\u(?:fdd0|dbb?[89a-f][0-9a-f])|\\U000f[0-9a-f]{4}", re.IGNORECASE)
_BEGIN, _TAIL = re.compile(r"^\W+"), re.compile(r"\W+$")
_CONTROL = re.compile(r"<[|｜][^\s<>]{1,60}[|｜]>|<(?:start|end)_of_turn>|\[/?INST\]")
"""Added tokens that are special whatever the tokenizer calls them: some add ChatML's as ordinary ones."""
_THOUGHTS = re.compile(r"</?(?:think|thinking|thought|reasoning)>")
"""Parts of an answer, which data sets write out in texts."""
_NEVER = "(?!)"  # a pattern that finds nothing
_END = ""  # of a text, in a tree of characters
_DEEPEST = 80  # characters; Python's patterns nest about so deep
_CHARACTERS_AT_ONCE = 4_000_000
"""Of texts that are tokenized in one call: an encoding takes about 100 bytes per token."""


class _Special(NamedTuple):
    """The mark and a tokenizer's special tokens, by number and by what is inside, and a pattern that finds them."""

    insides: Mapping[str, str]
    numbers: Mapping[str, int]
    texts: tuple[str, ...]
    pattern: re.Pattern


def marked(value: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Marks special tokens in what a row says.

    Args:
      value: a text, or what JSON can hold: all of its texts are looked at.
      tokenizer: whose special tokens.

    Returns:
      The same, with marks.
    """
    return _marked(value, _special(tokenizer))


def _marked(value: Any, special: _Special) -> Any:
    if isinstance(value, str):
        return special.pattern.sub(lambda found: MARK + chr(_FIRST + special.numbers[found[0]]), value)
    if isinstance(value, Mapping):
        return {_marked(key, special): _marked(inner, special) for key, inner in value.items()}
    return [_marked(inner, special) for inner in value] if isinstance(value, list | tuple) else value


def marked_text(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Marks special tokens in a plain text, but for the BOS that it may begin with, where the tokenizer begins so too.

    Args:
      text: of a row.
      tokenizer: whose special tokens.

    Returns:
      The same, with marks.
    """
    bos = cast(str | None, tokenizer.bos_token)
    begin = bos if bos and text.startswith(bos) and begins_with_bos(tokenizer) else ""
    return begin + marked(text[len(begin) :], tokenizer)


def without_marks(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A marked text as it is read.

    Args:
      text: with marks.
      tokenizer: whose special tokens.

    Returns:
      The text.
    """
    texts = _special(tokenizer).texts
    if MARK not in text:
        return text

    def of(found: re.Match) -> str:
        number = ord(found[1]) - _FIRST if found[1] else -1
        return texts[number] if 0 <= number < len(texts) else found[1]

    return _MARKED.sub(of, text)


def first_special(value: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    """The first special token whose text stands in what a row says.

    Args:
      value: a text without marks, or what JSON can hold.
      tokenizer: whose special tokens.

    Returns:
      Its text; "" = there is none.
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
    """The special token that a text is the inside of: a template that writes `<|`, it and `|>` would write the token.

    Args:
      text: without marks.
      tokenizer: whose special tokens.

    Returns:
      Its text, such as "<|im_end|>" of "im_end"; "" = there is none.
    """
    return _special(tokenizer).insides.get(text.strip(), "")


def check_marks(text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises where a template has taken marks apart, or written them in another form.

    Args:
      text: what it wrote.
      tokenizer: whose special tokens.

    Raises:
      ValueError: it has.
    """
    last = chr(_FIRST + len(_special(tokenizer).texts) - 1)
    if any(not chr(_FIRST) <= number <= last for number in _MARKED.findall(text)) or _ESCAPED.search(text):
        raise ValueError("it takes a special token's text in the row apart, or writes it in another form")


def begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts its BOS before a text.

    Args:
      tokenizer: the tokenizer.

    Returns:
      Whether.
    """
    first = tokenizer("a")["input_ids"][:1]
    return bool(first) and first[0] == tokenizer.bos_token_id


def token_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokenizes texts, without adding special tokens.

    Args:
      texts: with marks where a special token's text is a text; without them it is the token.
      tokenizer: the tokenizer, a fast one.

    Returns:
      Ids of each.

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
                assert renamed is not None
                given = [_with_names(texts[index], renamed, tokenizer) for index in some]
                found = renamed.tokenizer.encode_batch(given, add_special_tokens=False)
                for index, one in zip(some, found, strict=True):
                    ids[index] = one.ids
    except DataError:
        raise
    except Exception as error:  # the library has no errors of its own
        raise DataError(f"the tokenizer fails on a text: {type(error).__name__}: {str(error)[:300]}") from error
    return ids


@functools.lru_cache(maxsize=4)
def _normalizes_special(tokenizer: PreTrainedTokenizerBase, size: int) -> bool:
    """Whether a text that is no special token's may become one, as of letters that are wide or large.

    Then all texts are tokenized as those with marks, where that gives the tokens of a template's text the same ids.
    """
    del size  # a tokenizer that tokens were added to is another one
    content = json.loads(cast(Any, tokenizer.backend_tokenizer).to_str())
    texts = _special(tokenizer).numbers
    normalized = [one["content"] for one in content["added_tokens"] if one["normalized"] and one["content"] in texts]
    if not normalized or content["normalizer"] is None:
        return False
    tries = [f"a{text}b {text}\nc" for text in normalized]
    renamed = _renamed(tokenizer, _special(tokenizer).texts)
    given = [_with_names(text, renamed, tokenizer) for text in tries]
    found = [one.ids for one in renamed.tokenizer.encode_batch(given, add_special_tokens=False)]
    return found == tokenizer(tries, add_special_tokens=False)["input_ids"]


def _groups(texts: Sequence[str], indices: Sequence[int]) -> list[list[int]]:
    """The indices in order, in groups of not too many characters."""
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
    del size  # a tokenizer that tokens were added to is another one
    texts = {str(token) for token in named}
    for token in tokenizer.added_tokens_decoder.values():
        if token.special or _CONTROL.fullmatch(token.content):
            texts.add(token.content)
    known = tokenizer.get_vocab()
    texts = {text for text in texts if text and text in known and not _THOUGHTS.fullmatch(text)}
    ordered = [MARK, *sorted(texts - {MARK}, key=lambda text: (-len(text), text))]  # the longest first, as it is found
    if len(ordered) > _MOST:
        raise DataError(f"the tokenizer has {len(texts):,} special tokens; up to {_MOST:,} can be told from texts.")
    numbers = {text: number for number, text in enumerate(ordered)}
    insides = {inner: text for text in ordered for inner in _insides(text)}
    return _Special(insides, numbers, tuple(ordered), _pattern_of(ordered))


def _insides(text: str) -> Iterator[str]:
    """Of <|a|>: |a|, |a, a| and a."""
    begin, end = (len(found[0]) if (found := pattern.search(text)) else 0 for pattern in (_BEGIN, _TAIL))
    for first in range(1, min(begin, len(text)) + 1):
        yield from (text[first : len(text) - last] for last in range(1, end + 1) if first + last < len(text))


def _pattern_of(texts: Sequence[str]) -> re.Pattern:
    """Finds the longest of the texts; what several begin with is tried once, as there may be thousands."""
    if max(map(len, texts), default=0) > _DEEPEST:
        return re.compile("|".join(map(re.escape, texts)) or _NEVER)  # the longest come first
    tree: dict[str, Any] = {}
    for text in texts:
        node = tree
        for character in text:
            node = node.setdefault(character, {})
        node[_END] = {}

    def written(node: dict[str, Any]) -> str:
        branches = [re.escape(character) + written(inner) for character, inner in node.items() if character != _END]
        if not branches:
            return ""
        one = len(branches) == 1 and _END not in node
        return branches[0] if one else f"(?:{'|'.join(branches)}){'?' if _END in node else ''}"

    return re.compile(written(tree) or _NEVER)


class _Renamed(NamedTuple):
    """A tokenizer that knows special tokens under other names alone.

    Attributes:
      tokenizer: it.
      names: of each text.
      pattern: finds a text that has a name.
    """

    tokenizer: Tokenizer
    names: Mapping[str, str]
    pattern: re.Pattern


def _with_names(text: str, renamed: _Renamed, tokenizer: PreTrainedTokenizerBase) -> str:
    """A marked text with names for its special tokens, and with what is behind its marks."""
    return without_marks(renamed.pattern.sub(lambda found: renamed.names[found[0]], text), tokenizer)


@functools.lru_cache(maxsize=4)
def _renamed(tokenizer: PreTrainedTokenizerBase, special: tuple[str, ...]) -> _Renamed:
    secret = secrets.token_hex(8)  # which no row can know; ids do not depend on it
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
    else:  # Unigram's, with scores
        model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:  # no pieces may be merged to a token that is known by another name alone
        pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
        kept = [names.keys().isdisjoint((one, other, one + other)) for one, other in pairs]
        model["merges"] = [merge for merge, keep in zip(model["merges"], kept, strict=True) if keep]
    made = Tokenizer.from_str(json.dumps(content))
    wrong = [text for text in texts if made.token_to_id(names[text]) != tokenizer.convert_tokens_to_ids(text)]
    if wrong:
        raise DataError(
            f"the text of {wrong[0]!r} stands in a row, and this tokenizer cannot keep it apart from the token; take "
            "it out of the rows, or have it read as the token: --config.data.parse_special_tokens=true"
        )
    return _Renamed(made, names, _pattern_of(texts))
