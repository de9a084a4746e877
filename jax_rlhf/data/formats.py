"""TRL's data formats, and what each phase takes from a row.

| columns                          | SFT                      | reward             | PPO                |
|----------------------------------|--------------------------|--------------------|--------------------|
| text                             | all of it                |                    | its first tokens   |
| messages                         | the last turn is learned |                    | all but that turn  |
| prompt                           |                          |                    | prompt             |
| prompt, completion               | prompt → completion      |                    | prompt             |
| prompt, chosen, rejected         | prompt → chosen          | chosen vs rejected | prompt             |
| chosen, rejected                 | the same: the prompt is what both begin with                       |

Each of prompt, completion, chosen, rejected is a text, or a list of chat messages {"role", "content"}, which the
tokenizer's chat template turns into one. A prompt that is a text beside answers that are chats is what the user says,
unless the chats begin alike: then that is the prompt. What two texts begin with ends before the word in which they
differ, and in conversations written as HH writes them after the last "\\n\\nAssistant:" that both have.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from jax_rlhf.data.config import DataConfig
from jax_rlhf.data.errors import DataError
from jax_rlhf.data.sources import Row

PHASES = ("sft", "reward", "ppo")
_ANSWER_TURN = "\n\nAssistant:"
"""What an answer begins with where conversations are written as texts, as in Anthropic's HH."""
_NEEDED = {
    "sft": "text, or messages, or prompt and completion, or (prompt,) chosen and rejected",
    "reward": "(prompt,) chosen and rejected",
    "ppo": "prompt, or messages, or chosen and rejected, or text with config.data.prompt_tokens",
}


@dataclasses.dataclass(frozen=True)
class Texts:
    """What a phase takes from a row.

    Attributes:
      prompt: the prompt's text; "" = none.
      completions: none for PPO, one for SFT, (chosen, rejected) for the reward model.
      templated: a chat template wrote the texts: special tokens are in them.
      margin: by how much chosen is better, in reward units.
      columns: the row's other columns.
    """

    prompt: str
    completions: tuple[str, ...]
    templated: bool
    margin: float
    columns: Mapping[str, Any]


def row_texts(row: Row, phase: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Texts:
    """Reads one row.

    Args:
      row: as read.
      phase: "sft", "reward" or "ppo".
      config: names of columns.
      tokenizer: for its chat template.

    Returns:
      The texts.

    Raises:
      DataError: columns are missing, of a wrong type, or need a chat template that there is not.
    """
    names = _names(config)
    found = _found(row, names)
    prompt, completions = _parts(found, phase, row)
    if prompt is None or (config.prompt_tokens is None and phase == "ppo" and "text" in found and len(found) == 1):
        raise DataError(
            f"{row.where}: the {phase} phase needs the columns {_NEEDED[phase]}; this row has "
            f"{', '.join(sorted(row.content)) or 'none'}. Other names: --config.data.prompt_column=… and so on."
        )
    margin = found.get("margin", 0.0)
    if isinstance(margin, bool) or not isinstance(margin, int | float | str) or not _is_number(margin):
        raise DataError(f"{row.where}: column {names['margin']!r} holds {margin!r}; a number is expected.")
    others = {name: value for name, value in row.content.items() if name not in names.values()}
    parts = (prompt, *completions)
    for part in parts:
        _check_part(part, row)
    if all(isinstance(part, str) for part in parts):
        return Texts(prompt, tuple(completions), False, float(margin), others)
    return Texts(*_templated(prompt, completions, row, tokenizer), True, float(margin), others)


def own_prompt(row: Row, config: DataConfig) -> tuple[str, str]:
    """What the row's prompt is, whichever phase reads it: rows that give the same text here share a prompt.

    Args:
      row: as read.
      config: names of columns.

    Returns:
      (text, what it is: a "prompt"). White space around it does not count, and a chat of one message is the text of
      that message. A row without a prompt (or with an empty one) gives what SFT would learn of it: its "text",
      "completion" or "chosen".

    Raises:
      DataError: a part is neither a text nor a chat.
    """
    found = _with_prompt(_found(row, _names(config)), row)
    for kind in ("prompt", "text", "completion", "chosen"):
        if kind in found:
            _check_part(found[kind], row)
            text = _plain(found[kind])
            if text:
                return text, kind
    return json.dumps(row.content, sort_keys=True, default=str), ""


def _plain(part: str | list[dict]) -> str:
    """One text for a text and for a chat of one message; chats of several are written out with their roles."""
    if isinstance(part, str):
        return part.strip()
    if len(part) == 1 and part[0]["role"] in ("user", "assistant"):
        return part[0]["content"].strip()
    return json.dumps([[turn["role"], turn["content"].strip()] for turn in part]) if part else ""


def _names(config: DataConfig) -> dict[str, str]:
    kinds = ("prompt", "completion", "chosen", "rejected", "text", "messages", "margin")
    return {kind: getattr(config, f"{kind}_column") for kind in kinds}


def _found(row: Row, names: dict[str, str]) -> dict[str, Any]:
    """The columns that mean something, by what they are."""
    return {kind: row.content[name] for kind, name in names.items() if row.content.get(name) is not None}


def _is_number(value: float | str) -> bool:
    try:
        return abs(float(value)) < float("inf")
    except ValueError:
        return False


def _with_prompt(found: dict[str, Any], row: Row) -> dict[str, Any]:
    """The columns, with the prompt that pairs and messages hold in a column of its own."""
    pair = "chosen" in found and "rejected" in found
    answers = [found[kind] for kind in ("completion", "chosen", "rejected") if kind in found]
    for answer in answers:
        _check_part(answer, row)
    if isinstance(found.get("prompt"), str) and any(isinstance(answer, list) for answer in answers):
        # A text beside chats: the chats begin with it, or else it is what the user says.
        found = found | {"prompt": [{"role": "user", "content": found["prompt"]}]}
        if pair and isinstance(found["chosen"], list) and _shared_beginning(found["chosen"], found["rejected"]):
            del found["prompt"]
    if pair and "prompt" not in found:
        chosen, rejected = found["chosen"], found["rejected"]
        shared = _shared_beginning(chosen, rejected)
        found = found | {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}
    messages = found.get("messages")
    if messages is None or "prompt" in found:
        return found
    _check_part(messages, row)
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{row.where}: messages must be a list of at least one chat message.")
    answered = messages[-1]["role"] == "assistant"
    return found | {"prompt": messages[:-1], "completion": messages[-1:]} if answered else found | {"prompt": messages}


def _parts(found: dict[str, Any], phase: str, row: Row) -> tuple[Any, tuple]:
    """(prompt, completions), prompt None where the phase cannot use such a row."""
    pair = "chosen" in found and "rejected" in found
    if phase == "reward" and not pair:
        return None, ()
    asked = "prompt" in found
    found = _with_prompt(found, row)
    prompt = found.get("prompt")
    if phase == "reward":
        return prompt, (found["chosen"], found["rejected"])
    if phase == "ppo":
        return (found.get("text") if prompt is None else prompt), ()
    if not asked and prompt is not None and prompt is found.get("messages"):
        raise DataError(
            f"{row.where}: the last message is the {prompt[-1]['role']}'s; the SFT phase learns the assistant's."
        )
    if prompt is None:
        return ("", (found["text"],)) if "text" in found else (None, ())
    completion = found.get("completion", found.get("chosen") if pair else None)
    return (prompt, (completion,)) if completion is not None else (None, ())


def _shared_beginning(chosen: Any, rejected: Any) -> int:
    """How many messages, or characters up to the end of a word, the two have in common at the beginning."""
    if isinstance(chosen, list) and isinstance(rejected, list):  # an answer is at least one message
        return max(0, min(_agree(chosen, rejected), len(chosen) - 1, len(rejected) - 1))
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        return 0
    shared = _agree(chosen, rejected)
    turn = chosen.rfind(_ANSWER_TURN, 0, shared)
    if turn >= 0:  # pairs of one conversation have one prompt, also where both answers begin with the same words
        return turn + len(_ANSWER_TURN)
    while shared > 0 and not chosen[shared - 1].isspace():  # "… so good" / "… so grim": the prompt ends before the word
        shared -= 1
    return len(chosen[:shared].rstrip())


def _agree(one: str | list, other: str | list) -> int:
    """How many characters or messages are the same from the beginning on, found by halving."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _check_part(part: Any, row: Row) -> None:
    if isinstance(part, str):
        return
    if isinstance(part, list):
        for message in part:
            if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
                raise DataError(f'{row.where}: {str(message)[:80]} is no chat message {{"role": …, "content": …}}.')
        return
    raise DataError(
        f"{row.where}: {str(part)[:80]!r} is a {type(part).__name__}; a text or a list of chat messages is expected."
    )


def _templated(prompt: Any, completions: tuple, row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[str, tuple]:
    if tokenizer.chat_template is None:
        raise DataError(
            f"{row.where}: this row is a chat, and the tokenizer has no chat template. Take an instruction-tuned "
            "checkpoint, put a chat_template.jinja into the checkpoint's folder, or give plain texts."
        )
    prompt, *answers = (
        [{"role": role, "content": part}] if isinstance(part, str) and part else part or []
        for part, role in [(prompt, "user"), *((answer, "assistant") for answer in completions)]
    )
    try:
        asked = _rendered(tokenizer, prompt, ask=True) if prompt else ""
        if not answers:
            return asked, ()
        told = _rendered(tokenizer, prompt, ask=False) if prompt else ""
        whole = [_rendered(tokenizer, [*prompt, *answer], ask=False) for answer in answers]
    except Exception as error:  # the template is the checkpoint's; jinja and it raise what they like
        raise DataError(f"{row.where}: the chat template fails: {type(error).__name__}: {error}") from error
    begin = _common_prefix([asked, *whole]) if prompt else ""
    # What the template ends a conversation with, where no answer is asked for, is no part of the prompt.
    if prompt and not begin.startswith(_common_prefix([told, asked])):
        raise DataError(f"{row.where}: once there is an answer, the chat template writes the prompt in another way.")
    says = [any(message["content"].strip() for message in answer) for answer in answers]
    return begin, tuple(text[len(begin) :] if said else "" for text, said in zip(whole, says, strict=True))


def _common_prefix(texts: list[str]) -> str:
    first, last = min(texts), max(texts)
    return first[: _agree(first, last)]


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict], *, ask: bool) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
