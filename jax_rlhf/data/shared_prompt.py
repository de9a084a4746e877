"""Finds the end of the prompt in two answers that are stored as whole texts with a common beginning."""

import re
import unicodedata

from jax_rlhf.data.chats import common_length

_TURNS = (
    # Headers of an answer in chat templates.
    r"<\|(?:start_header_id|header_start)\|>assistant<\|\w{1,20}\|>\n{0,2}",  # Llama 3 and 4
    r"<\|(?:im_start|start_of_role|start)\|>assistant(?:<\|\w{1,20}\|>(?:final<\|message\|>)?)?\n?",  # ChatML, Granite
    r"<start_of_turn>model\n?",  # Gemma
    r"\[/INST\]",  # Llama 2, Mistral
    r"<[|｜](?i:\w{0,20}assistant|answer|bot|chatbot_token)[|｜]>\n?",  # Phi-3, Zephyr, DeepSeek, Command R
    # Headers in data sets: Anthropic's HH, Vicuna, Alpaca.
    r"(?:^|(?<=[\s>]))(?:Assistant|ASSISTANT|Chatbot|ChatGPT)\s?[:：]",
    r"(?:^|(?<=\n))(?i:assistant|chatbot|chatgpt|bot|ai|gpt|model|agent)\s?[:：]",
    r"(?:^|(?<=\n))#{1,4} ?(?i:response|assistant|answer|output)\s?[:：]?\n",
    r"(?:^|(?<=[\n ]))#{1,4} ?(?i:response|assistant|answer|output)\s?[:：]",
    r"(?:助手|助理|アシスタント)\s?[:：]",
)
_ANSWERS = (
    r"(?:^|(?<=\n))(?:A|(?i:answer|response|output|reply|tl;dr))\s?[:：]",
    r"\bTL;DR:",
    r"(?:回答|答え?)\s?[:：]",
)
_BEGINNINGS = tuple(re.compile("|".join(patterns)) for patterns in (_TURNS, _ANSWERS))
"""Patterns of the header before an answer in conversations stored as texts. The second is tried if the first does not
match, because an answer itself may contain its words."""
_UNSPACED = ((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF))
"""Thai and Lao, Burmese, Khmer: written without spaces between words, like Chinese and Japanese."""


def shared_prompt(chosen: str, rejected: str) -> int:
    """The number of characters at the beginning of two texts that are their prompt.

    If the common beginning has headers of an answer, the prompt ends after the last of them: both answers may begin
    with the same words. Otherwise it ends before the first word that differs, and in a script without spaces before the
    first character that differs. Each text has at least one character after the prompt, unless the two are equal.
    """
    shared = common_length(chosen, rejected)
    for beginning in _BEGINNINGS:
        turns = [turn.end() for turn in beginning.finditer(chosen, 0, shared)]
        if turns:
            return turns[-1]
    shared = min(shared, len(chosen) - 1, len(rejected) - 1)
    spaced = any(character.isspace() for character in chosen + rejected)
    while shared > 0 and not _ends_word(chosen, rejected, shared, spaced=spaced):
        shared -= 1
    return len(chosen[: max(shared, 0)].rstrip())


def _ends_word(chosen: str, rejected: str, position: int, *, spaced: bool) -> bool:
    """Whether both texts may be split at a position."""
    before, after = chosen[position - 1], (chosen[position], rejected[position])
    if before.isspace() or _is_unspaced(before) or all(map(_is_unspaced, after)):
        return True
    # "… so good" / "… so grim" are split before the word; "A:4" / "A:5", texts without spaces, before the number.
    return not spaced and not (before.isalnum() and any(character.isalnum() for character in after))


def _is_unspaced(character: str) -> bool:
    if any(first <= ord(character) <= last for first, last in _UNSPACED):
        return True
    # Hangul is wide too, but it is written with spaces.
    wide = unicodedata.east_asian_width(character) in "WF"
    return wide and not unicodedata.name(character, "").startswith("HANGUL")
