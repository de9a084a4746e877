"""Where the prompt ends that two answers, written as whole texts, begin with."""

import re
import unicodedata

from jax_rlhf.data.chats import agreeing

_TURNS = (
    # What chat templates write before an answer.
    r"<\|(?:start_header_id|header_start)\|>assistant<\|\w{1,20}\|>\n{0,2}",  # Llama 3 and 4
    r"<\|(?:im_start|start_of_role|start)\|>assistant(?:<\|\w{1,20}\|>(?:final<\|message\|>)?)?\n?",  # ChatML, Granite
    r"<start_of_turn>model\n?",  # Gemma
    r"\[/INST\]",  # Llama 2, Mistral
    r"<[|｜](?i:\w{0,20}assistant|answer|bot|chatbot_token)[|｜]>\n?",  # Phi-3, Zephyr, DeepSeek, Command R
    # What data sets write: Anthropic's HH, Vicuna, Alpaca.
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
"""What an answer begins after, in conversations written as texts; the second where the first is not found, as answers
may say it themselves."""
_UNSPACED = ((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF))
"""Thai and Lao, Burmese, Khmer: written without spaces between words, as Chinese and Japanese are."""


def shared_prompt(chosen: str, rejected: str) -> int:
    """How many characters of two texts are their prompt.

    What both begin with, up to the last beginning of an answer's turn where there is one: answers may begin with the
    same words. Else it ends before the word in which the texts differ, and in a script without spaces at the character.

    Args:
      chosen, rejected: two texts.

    Returns:
      Their number; each text has something after it, unless the two are the same.
    """
    shared = agreeing(chosen, rejected)
    for beginning in _BEGINNINGS:
        turns = [turn.end() for turn in beginning.finditer(chosen, 0, shared)]
        if turns:
            return turns[-1]
    shared = min(shared, len(chosen) - 1, len(rejected) - 1)
    spaced = any(character.isspace() for character in chosen + rejected)
    while shared > 0 and not _ends_word(chosen, rejected, shared, spaced=spaced):
        shared -= 1
    return len(chosen[: max(shared, 0)].rstrip())


def _ends_word(chosen: str, rejected: str, place: int, *, spaced: bool) -> bool:
    """Whether both texts may be cut there."""
    before, after = chosen[place - 1], (chosen[place], rejected[place])
    if before.isspace() or _is_unspaced(before) or all(map(_is_unspaced, after)):
        return True
    # "… so good" / "… so grim" are cut before the word; "A:4" / "A:5", where no text has a space, before the number.
    return not spaced and not (before.isalnum() and any(character.isalnum() for character in after))


def _is_unspaced(character: str) -> bool:
    if any(first <= ord(character) <= last for first, last in _UNSPACED):
        return True
    # Hangul is wide too, and has spaces.
    wide = unicodedata.east_asian_width(character) in "WF"
    return wide and not unicodedata.name(character, "").startswith("HANGUL")
