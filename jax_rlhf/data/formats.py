"""TRL's data formats, and what each phase takes from a row.

| columns                          | SFT                      | reward             | PPO                |
|----------------------------------|--------------------------|--------------------|--------------------|
| text                             | all of it                |                    | its first tokens   |
| messages                         | the last turn is learned |                    | all but that turn  |
| prompt                           |                          |                    | prompt             |
| prompt, completion               | prompt → completion      |                    | prompt             |
| prompt, completion, label        | the same, if label holds |                    | prompt             |
| prompt, chosen, rejected         | prompt → chosen          | chosen vs rejected | prompt             |
| chosen, rejected                 | the same: the prompt is what both begin with                       |

Each of prompt, completion, chosen, rejected is a text, or a list of chat messages, which the tokenizer's chat template
turns into one (`chats.py`); `conversations` are messages too. A prompt that is a text beside answers that are chats is
what the user says, unless the chats begin alike: then that is the prompt. Beside `messages` alone it is left aside:
they begin with it. A prompt whose last turn is the assistant's is continued. `shared_prompt.py` says where the prompt
of two texts ends.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from jax_rlhf.data.chats import (
    Message,
    Rendering,
    agreeing,
    check_names,
    checked_messages,
    from_json,
    rendered,
    template_options,
    tools_of,
    writes_tools,
)
from jax_rlhf.data.config import DataConfig
from jax_rlhf.data.data_error import DataError
from jax_rlhf.data.shared_prompt import shared_prompt
from jax_rlhf.data.sources import Row
from jax_rlhf.data.special_tokens import MARK, first_special, marked, marked_text, without_marks

_NEEDED = {
    "sft": "text, or messages, or prompt and completion, or (prompt,) chosen and rejected",
    "reward": "(prompt,) chosen and rejected",
    "ppo": "prompt, or messages, or chosen and rejected, or text with config.data.prompt_tokens",
}
_CHATS = ("prompt", "completion", "chosen", "rejected", "messages", "text")
_OTHER_NAMES = {"messages": "conversations"}
"""ShareGPT's name, where a row has no column of ours."""
_LARGEST_MARGIN = 1_000_000
"""Past which float32 has no fractions left, and a loss no meaning."""
_TEMPLATE_OPTIONS = "chat_template_kwargs"
UNDESIRED = "an undesired completion, whose label is false; --config.data.label_column=none learns it too"


@dataclasses.dataclass(frozen=True)
class Texts:
    """What a phase takes from a row.

    Attributes:
      prompt: the prompt's text; "" = none. Marked, and so are completions: see `special_tokens.py`.
      completions: none for PPO, one for SFT, (chosen, rejected) for the reward model.
      templated: a chat template wrote the texts: special tokens are in them.
      margin: by how much chosen is better, in reward units.
      columns: the row's other columns.
      chat: the prompt's messages, where it is a chat.
      continued: the chat ends within a turn of the assistant, which the answer goes on with.
      tools_unwritten: the row has tools, or calls in its prompt, and the chat template does not write them.
      implicit: the prompt is what two texts begin with.
      repeated: each answer begins with the prompt's own text.
      special: a special token whose text stands in the row, or "".
      unwritten: a part of an answer that the chat template leaves out, or "".
      left_out: why the phase does not learn from the row, or "".
    """

    prompt: str
    completions: tuple[str, ...]
    templated: bool
    margin: float
    columns: Mapping[str, Any]
    chat: list[Message] | None = None
    continued: bool = False
    tools_unwritten: bool = False
    implicit: bool = False
    repeated: bool = False
    special: str = ""
    unwritten: str = ""
    left_out: str = ""


def row_texts(row: Row, phase: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Texts:
    """Reads one row.

    Args:
      row: as read.
      phase: "sft", "reward" or "ppo".
      config: names of columns, and whether texts are chats.
      tokenizer: for its chat template.

    Returns:
      The texts.

    Raises:
      DataError: columns are missing, of a wrong type, or need a chat template that there is not.
    """
    names = _names(row, config)
    found = _found(row, names)
    prompt, completions = _parts(found, phase, row)
    if prompt is None or (config.prompt_tokens is None and phase == "ppo" and "text" in found and len(found) == 1):
        raise DataError(
            f"{row.where}: the {phase} phase needs the columns {_NEEDED[phase]}; this row has "
            f"{', '.join(sorted(row.content)) or 'none'}. Other names: --config.data.prompt_column=… and so on."
        )
    margin = found.get("margin", 0.0)
    is_number = not isinstance(margin, bool) and isinstance(margin, int | float | str) and _is_number(margin)
    if not is_number or abs(float(margin)) > _LARGEST_MARGIN:
        raise DataError(
            f"{row.where}: column {names['margin']!r} holds {str(margin)[:80]!r}; a number is expected, in reward "
            f"units and from −{_LARGEST_MARGIN:,} to {_LARGEST_MARGIN:,}."
        )
    others = {name: value for name, value in row.content.items() if name not in names.values()}
    more = {
        "implicit": "prompt" not in found and isinstance(found.get("chosen"), str) and "rejected" in found,
        "left_out": UNDESIRED if phase == "sft" and _is_undesired(row, found, config) else "",
    }
    texts = all(isinstance(part, str) for part in (prompt, *completions))
    more["repeated"] = texts and bool(prompt.strip() and completions) and all(a.startswith(prompt) for a in completions)
    if texts and not (config.as_chat and prompt and "prompt" in found):
        parts, more["special"] = _marked_parts([prompt, *completions], config, tokenizer)
        return Texts(parts[0], tuple(parts[1:]), False, float(margin), others, **more)
    if tokenizer.chat_template is None:
        raise DataError(
            f"{row.where}: this row is a chat, and the tokenizer has no chat template. Take an instruction-tuned "
            "checkpoint, put a chat_template.jinja into the checkpoint's folder, or give plain texts."
        )
    chat, answers = _as_messages(prompt, "user"), [_as_messages(answer, "assistant") for answer in completions]
    for answer in answers if chat else ():  # without a prompt they are whole conversations
        if answer and answer[0]["role"] not in ("assistant", "tool"):
            raise DataError(
                f"{row.where}: an answer begins with the {answer[0]['role']}'s message {str(answer[0])[:80]}; the "
                "assistant's is expected."
            )
    tools = tools_of(row.content.get(config.tools_column), row.where)
    options = template_options(row.content.get(_TEMPLATE_OPTIONS), row.where)
    continued, said = _is_continued(found, chat, answers, row), [chat, answers, tools, options]
    more |= {"chat": chat, "continued": continued, "special": first_special(said, tokenizer)}
    if not config.parse_special_tokens:
        check_names([chat, *answers], options, tokenizer, row.where)
    marks = bool(more["special"]) and not config.parse_special_tokens
    if marks:
        chat, answers, tools, options = marked(said, tokenizer)
    render = Rendering(tokenizer, row.where, tools, options, marks)
    begin, answers, unwritten = rendered(render, chat, answers, continued=continued)
    more["unwritten"] = without_marks(unwritten, tokenizer)
    if chat and (tools or any("tool_calls" in message for message in chat)):
        more["tools_unwritten"] = not writes_tools(render, chat)
    return Texts(begin, answers, True, float(margin), others, **more)


def _marked_parts(parts: list[str], config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], str]:
    """(a prompt and its answers with marks, a special token whose text stands in them)."""
    special = first_special(parts, tokenizer)
    if not special or config.parse_special_tokens:
        return parts, special
    begins = [index == 0 or not parts[0] for index in range(len(parts))]  # there a text may have its BOS
    both = list(zip(parts, begins, strict=True))
    found = [marked_text(part, tokenizer) if begin else marked(part, tokenizer) for part, begin in both]
    return found, special if any(MARK in part for part in found) else ""  # BOS alone is as it should be


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
    found = _with_prompt(_found(row, _names(row, config)), row)
    for kind in ("prompt", "text", "completion", "chosen"):
        if kind in found:
            _check_part(found[kind], row)
            text = _plain(found[kind])
            if text:
                return text, kind
    return json.dumps(row.content, sort_keys=True, default=str), ""


def _plain(part: str | list[Message]) -> str:
    """One text for a text and for a chat of one message; chats of several are written out with their roles."""
    if isinstance(part, str):
        return part.strip()
    if len(part) == 1 and part[0]["role"] in ("user", "assistant") and not part[0].get("tool_calls"):
        return part[0]["content"].strip()
    turns = [[turn["role"], turn["content"].strip(), *turn.get("tool_calls", ())] for turn in part]
    return json.dumps(turns, default=str) if part else ""


def _names(row: Row, config: DataConfig) -> dict[str, str]:
    """Columns that mean something, by what they are."""
    kinds = ("prompt", "completion", "chosen", "rejected", "text", "messages", "margin")
    names = {kind: getattr(config, f"{kind}_column") for kind in kinds}
    for kind, other in _OTHER_NAMES.items():
        if (
            names[kind] == kind
            and row.content.get(kind) is None
            and isinstance(from_json(row.content.get(other)), list)
        ):
            names[kind] = other
    return names


def _found(row: Row, names: dict[str, str]) -> dict[str, Any]:
    """What the row has of them, with chats in one form."""
    found = {kind: row.content[name] for kind, name in names.items() if row.content.get(name) is not None}
    if isinstance(found.get("messages"), str):
        found["messages"] = from_json(found["messages"])  # a CSV file holds no lists
    single = {kind: [part] for kind, part in found.items() if kind in _CHATS and isinstance(part, dict)}
    found |= single  # a message that stands alone
    chats = {kind: part for kind, part in found.items() if kind in _CHATS and isinstance(part, list)}
    found |= {kind: checked_messages(part, row.where) for kind, part in chats.items()}
    messages, system = found.get("messages"), row.content.get("system")
    if not messages or not isinstance(messages, list):
        return found
    share_gpt = names["messages"] in _OTHER_NAMES.values() and isinstance(system, str) and system.strip()
    if share_gpt and messages[0]["role"] != "system":
        messages = found["messages"] = [{"role": "system", "content": system}, *messages]
    answers = [found[kind] for kind in ("completion", "chosen", "rejected") if kind in found]
    for answer in answers:
        _check_part(answer, row)
    whole = "completion" in found or ("chosen" in found and "rejected" in found)
    if "prompt" in found and not whole:
        del found["prompt"]  # which the messages begin with
    elif "prompt" not in found and whole and not any(answer[:1] == messages[:1] for answer in answers):
        found["prompt"] = found.pop("messages")  # the answers are to them, and no whole conversations
    return found


def _is_number(value: float | str) -> bool:
    try:
        return abs(float(value)) < float("inf")
    except (ValueError, OverflowError):
        return False


def _is_undesired(row: Row, found: Mapping[str, Any], config: DataConfig) -> bool:
    """Whether a completion is an example of what not to say, as in TRL's unpaired preferences."""
    label = row.content.get(config.label_column)
    if isinstance(label, str):
        label = {"false": 0, "no": 0}.get(label.strip().lower(), label)
    return (
        "completion" in found and isinstance(label, bool | int | float | str) and _is_number(label) and not float(label)
    )


def _with_prompt(found: dict[str, Any], row: Row) -> dict[str, Any]:
    """The columns, with the prompt that pairs and messages hold in a column of its own."""
    pair = "chosen" in found and "rejected" in found
    kinds = [kind for kind in ("completion", "chosen", "rejected") if kind in found]
    for kind in kinds:
        _check_part(found[kind], row)
    if isinstance(found.get("prompt"), str) and any(isinstance(found[kind], list) for kind in kinds):
        # A text beside chats: the chats begin with it, or else it is what the user says.
        found = found | {"prompt": [{"role": "user", "content": found["prompt"]}]}
        if pair and isinstance(found["chosen"], list) and _shared_beginning(found["chosen"], found["rejected"]):
            del found["prompt"]
    prompt = found.get("prompt")
    if prompt and isinstance(prompt, list) and kinds:
        # Answers may be whole conversations, with or without the system's turn.
        for begin in (prompt, [message for message in prompt if message["role"] != "system"]):
            if begin and all(_goes_on(found[kind], begin) for kind in kinds):
                found = found | {kind: found[kind][len(begin) :] for kind in kinds}
    if pair and "prompt" not in found:
        chosen, rejected = found["chosen"], found["rejected"]
        shared = _shared_beginning(chosen, rejected)
        found = found | {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}
    messages = found.get("messages")
    if messages is None or "prompt" in found:
        return found
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{row.where}: messages must be a list of at least one chat message.")
    answered = messages[-1]["role"] == "assistant"
    return found | {"prompt": messages[:-1], "completion": messages[-1:]} if answered else found | {"prompt": messages}


def _goes_on(answer: Any, prompt: list[Message]) -> bool:
    return isinstance(answer, list) and len(answer) > len(prompt) and answer[: len(prompt)] == prompt


def _parts(found: dict[str, Any], phase: str, row: Row) -> tuple[Any, tuple]:
    """(prompt, completions), prompt None where the phase cannot use such a row."""
    pair = "chosen" in found and "rejected" in found
    if phase == "reward" and not pair:
        return None, ()
    asked = "prompt" in found
    found = _with_prompt(found, row)
    prompt = found.get("prompt")
    if phase == "reward":
        parts = prompt, (found["chosen"], found["rejected"])
    elif phase == "ppo":
        parts = (found.get("text") if prompt is None else prompt), ()
    elif not asked and prompt is not None and prompt is found.get("messages"):
        raise DataError(
            f"{row.where}: the last message is the {prompt[-1]['role']}'s; the SFT phase learns the assistant's."
        )
    else:
        completion = found.get("completion", found.get("chosen") if pair else None)
        if prompt is not None and completion is not None:
            parts = prompt, (completion,)
        else:
            parts = ("", (found["text"],)) if "text" in found else (None, ())
    for part in parts[1] if parts[0] is None else (parts[0], *parts[1]):
        _check_part(part, row)
    return parts


def _shared_beginning(chosen: Any, rejected: Any) -> int:
    """How many messages, or characters, of two answers are their prompt."""
    if isinstance(chosen, list) and isinstance(rejected, list):  # an answer is at least one message
        return max(0, min(agreeing(chosen, rejected), len(chosen) - 1, len(rejected) - 1))
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        return 0
    return shared_prompt(chosen, rejected)


def _check_part(part: Any, row: Row) -> None:
    if not isinstance(part, str | list):
        raise DataError(
            f"{row.where}: {str(part)[:80]!r} is of type {type(part).__name__}; a text or a list of chat messages is "
            "expected."
        )


def _as_messages(part: str | list[Message], role: str) -> list[Message]:
    return part if isinstance(part, list) else [{"role": role, "content": part}] if part else []


def _is_continued(found: Mapping[str, Any], chat: list[Message], answers: list[list[Message]], row: Row) -> bool:
    """Whether a prompt of its own ends within a turn of the assistant; two turns of one conversation are two."""
    if "prompt" not in found or not chat or chat[-1]["role"] != "assistant":
        return False
    if any(answer and answer[0]["role"] == "tool" for answer in answers):
        return False
    if chat[-1].get("tool_calls"):
        raise DataError(f"{row.where}: the prompt ends with a tool call; what answers it is the tool's message.")
    return True
