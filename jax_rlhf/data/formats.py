"""Reads rows in TRL's data formats: the prompt and completions that each phase takes from a row.

| columns                          | SFT                      | reward             | PPO                |
|----------------------------------|--------------------------|--------------------|--------------------|
| text                             | all of it                |                    | its first tokens   |
| messages                         | the last turn is learned |                    | all but that turn  |
| prompt                           |                          |                    | prompt             |
| prompt, completion               | prompt → completion      |                    | prompt             |
| prompt, completion, label        | the same, if label true  |                    | prompt             |
| prompt, chosen, rejected         | prompt → chosen          | chosen vs rejected | prompt             |
| chosen, rejected                 | the same; the prompt is the common beginning of both               |

Each of prompt, completion, chosen and rejected is a text or a list of chat messages, which the tokenizer's chat
template renders as text (`chats.py`). `conversations` is another name of messages.

- If the prompt is a text and the answers are chats, the prompt is a message of the user. But if both chats have a
common
  beginning, that beginning is the prompt.
- A prompt beside nothing but `messages` is ignored, because the messages begin with it.
- If the last turn of a prompt is the assistant's, the answer continues that turn.
- `shared_prompt.py` finds the end of the prompt in two texts with a common beginning.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from jax_rlhf.data.chats import (
    Message,
    Rendering,
    check_names,
    checked_messages,
    common_length,
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
"""ShareGPT's name of a column, for rows without a column of the standard name."""
_LARGEST_MARGIN = 1_000_000
"""Beyond it float32 loses fractions, and the loss is meaningless."""
_TEMPLATE_OPTIONS = "chat_template_kwargs"
UNDESIRED = "an undesired completion, with a false label; --config.data.label_column=none learns it too"


@dataclasses.dataclass(frozen=True)
class Texts:
    """The prompt and completions that a phase takes from a row.

    Attributes:
      prompt: the prompt's text; "" = none. It has marks, and so have completions: see `special_tokens.py`.
      completions: none for PPO, one for SFT, (chosen, rejected) for the reward model.
      templated: a chat template rendered the texts, which therefore contain special tokens.
      margin: by how much the chosen answer is better, in reward units.
      columns: the row's other columns.
      chat: the prompt's messages if it is a chat.
      continued: the chat ends within a turn of the assistant, and the answer continues that turn.
      tools_unwritten: the row has tools, or tool calls in its prompt, that the chat template does not render.
      implicit: the prompt is the common beginning of two texts.
      repeated: each answer begins with the text of the prompt.
      special: a special token whose text is in the row, or "".
      unwritten: a part of an answer that the chat template omits, or "".
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
    """Reads the prompt and completions of one row.

    Args:
      row: the row as it was read.
      phase: "sft", "reward" or "ppo".
      config: names of columns, and whether plain texts are chats.
      tokenizer: has the chat template.

    Raises:
      DataError: columns are missing or have a wrong type, or the row is a chat and the tokenizer has no chat template.
    """
    names = _names(row, config)
    found = _found(row, names)
    prompt, completions = _parts(found, phase, row)
    if prompt is None or (config.prompt_tokens is None and phase == "ppo" and "text" in found and len(found) == 1):
        raise DataError(
            f"{row.where}: the {phase} phase needs the columns {_NEEDED[phase]}; this row has "
            f"{', '.join(sorted(row.content)) or 'none'}. Set other names with --config.data.prompt_column=… and so on."
        )
    margin = found.get("margin", 0.0)
    is_number = not isinstance(margin, bool) and isinstance(margin, int | float | str) and _is_number(margin)
    if not is_number or abs(float(margin)) > _LARGEST_MARGIN:
        raise DataError(
            f"{row.where}: column {names['margin']!r} is {str(margin)[:80]!r}; it must be a number in reward units, "
            f"from −{_LARGEST_MARGIN:,} to {_LARGEST_MARGIN:,}."
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
            f"{row.where}: this row is a chat, and the tokenizer has no chat template. Use an instruction-tuned "
            "checkpoint, put a chat_template.jinja into the checkpoint's folder, or use plain texts."
        )
    chat, answers = _as_messages(prompt, "user"), [_as_messages(answer, "assistant") for answer in completions]
    for answer in answers if chat else ():  # without a prompt the answers are whole conversations
        if answer and answer[0]["role"] not in ("assistant", "tool"):
            raise DataError(
                f"{row.where}: an answer begins with the {answer[0]['role']}'s message {str(answer[0])[:80]}; it must "
                "begin with the assistant's."
            )
    tools = tools_of(row.content.get(config.tools_column), row.where)
    options = template_options(row.content.get(_TEMPLATE_OPTIONS), row.where)
    continued, inputs = _is_continued(found, chat, answers, row), [chat, answers, tools, options]
    more |= {"chat": chat, "continued": continued, "special": first_special(inputs, tokenizer)}
    if not config.parse_special_tokens:
        check_names([chat, *answers], options, tokenizer, row.where)
    marks = bool(more["special"]) and not config.parse_special_tokens
    if marks:
        chat, answers, tools, options = marked(inputs, tokenizer)
    render = Rendering(tokenizer, row.where, tools, options, marks)
    begin, answers, unwritten = rendered(render, chat, answers, continued=continued)
    more["unwritten"] = without_marks(unwritten, tokenizer)
    if chat and (tools or any("tool_calls" in message for message in chat)):
        more["tools_unwritten"] = not writes_tools(render, chat)
    return Texts(begin, answers, True, float(margin), others, **more)


def _marked_parts(parts: list[str], config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], str]:
    """(a prompt and its answers with marks, a special token whose text is in them or "")."""
    special = first_special(parts, tokenizer)
    if not special or config.parse_special_tokens:
        return parts, special
    begins = [index == 0 or not parts[0] for index in range(len(parts))]  # the part may begin with BOS
    both = list(zip(parts, begins, strict=True))
    found = [marked_text(part, tokenizer) if begin else marked(part, tokenizer) for part, begin in both]
    return found, special if any(MARK in part for part in found) else ""  # a leading BOS alone is no reason for a note


def own_prompt(row: Row, config: DataConfig) -> tuple[str, str]:
    """A row's prompt, the same in every phase: rows with equal results have the same prompt.

    Args:
      row: the row as it was read.
      config: names of columns.

    Returns:
      (text, kind). The kind is "prompt", and the text has no white space around it; a chat of one message counts as
      the text of that message. For a row without a prompt, or with an empty one, the text is what SFT would learn, and
      the kind is "text", "completion" or "chosen".

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
    """The content of a text or of a chat of one message; a longer chat is dumped as JSON with its roles."""
    if isinstance(part, str):
        return part.strip()
    if len(part) == 1 and part[0]["role"] in ("user", "assistant") and not part[0].get("tool_calls"):
        return part[0]["content"].strip()
    turns = [[turn["role"], turn["content"].strip(), *turn.get("tool_calls", ())] for turn in part]
    return json.dumps(turns, default=str) if part else ""


def _names(row: Row, config: DataConfig) -> dict[str, str]:
    """Kind of part ("prompt", "chosen", …) → name of its column in this row."""
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
    """Kind → part, for the parts that the row has; chats are converted to one format."""
    found = {kind: row.content[name] for kind, name in names.items() if row.content.get(name) is not None}
    if isinstance(found.get("messages"), str):
        found["messages"] = from_json(found["messages"])  # a CSV file cannot store lists
    single = {kind: [part] for kind, part in found.items() if kind in _CHATS and isinstance(part, dict)}
    found |= single  # a single message without a list
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
        del found["prompt"]  # the messages begin with it
    elif "prompt" not in found and whole and not any(answer[:1] == messages[:1] for answer in answers):
        found["prompt"] = found.pop("messages")  # the answers do not repeat the messages, but answer them
    return found


def _is_number(value: float | str) -> bool:
    try:
        return abs(float(value)) < float("inf")
    except (ValueError, OverflowError):
        return False


def _is_undesired(row: Row, found: Mapping[str, Any], config: DataConfig) -> bool:
    """Whether a completion has a false label, as in TRL's unpaired preferences."""
    label = row.content.get(config.label_column)
    if isinstance(label, str):
        label = {"false": 0, "no": 0}.get(label.strip().lower(), label)
    return (
        "completion" in found and isinstance(label, bool | int | float | str) and _is_number(label) and not float(label)
    )


def _with_prompt(found: dict[str, Any], row: Row) -> dict[str, Any]:
    """The parts with an explicit "prompt": it is split off from pairs and messages that contain it."""
    pair = "chosen" in found and "rejected" in found
    kinds = [kind for kind in ("completion", "chosen", "rejected") if kind in found]
    for kind in kinds:
        _check_part(found[kind], row)
    if isinstance(found.get("prompt"), str) and any(isinstance(found[kind], list) for kind in kinds):
        # A text prompt beside chats: the chats begin with it, or else it is a message of the user.
        found = found | {"prompt": [{"role": "user", "content": found["prompt"]}]}
        if pair and isinstance(found["chosen"], list) and _shared_beginning(found["chosen"], found["rejected"]):
            del found["prompt"]
    prompt = found.get("prompt")
    if prompt and isinstance(prompt, list) and kinds:
        # Answers may be whole conversations, with or without the system message.
        for begin in (prompt, [message for message in prompt if message["role"] != "system"]):
            if begin and all(_extends(found[kind], begin) for kind in kinds):
                found = found | {kind: found[kind][len(begin) :] for kind in kinds}
    if pair and "prompt" not in found:
        chosen, rejected = found["chosen"], found["rejected"]
        shared = _shared_beginning(chosen, rejected)
        found = found | {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}
    messages = found.get("messages")
    if messages is None or "prompt" in found:
        return found
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{row.where}: messages must be a list with at least one chat message.")
    answered = messages[-1]["role"] == "assistant"
    return found | {"prompt": messages[:-1], "completion": messages[-1:]} if answered else found | {"prompt": messages}


def _extends(answer: Any, prompt: list[Message]) -> bool:
    return isinstance(answer, list) and len(answer) > len(prompt) and answer[: len(prompt)] == prompt


def _parts(found: dict[str, Any], phase: str, row: Row) -> tuple[Any, tuple]:
    """(prompt, completions); the prompt is None if the phase cannot use the row."""
    pair = "chosen" in found and "rejected" in found
    if phase == "reward" and not pair:
        return None, ()
    has_prompt = "prompt" in found
    found = _with_prompt(found, row)
    prompt = found.get("prompt")
    if phase == "reward":
        parts = prompt, (found["chosen"], found["rejected"])
    elif phase == "ppo":
        parts = (found.get("text") if prompt is None else prompt), ()
    elif not has_prompt and prompt is not None and prompt is found.get("messages"):
        raise DataError(
            f"{row.where}: the last message is the {prompt[-1]['role']}'s; the SFT phase needs one of the assistant."
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
    """The number of messages, or characters, at the beginning of two answers that are their prompt."""
    if isinstance(chosen, list) and isinstance(rejected, list):  # at least one message is left for each answer
        return max(0, min(common_length(chosen, rejected), len(chosen) - 1, len(rejected) - 1))
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        return 0
    return shared_prompt(chosen, rejected)


def _check_part(part: Any, row: Row) -> None:
    if not isinstance(part, str | list):
        raise DataError(
            f"{row.where}: {str(part)[:80]!r} is of type {type(part).__name__}; it must be a text or a list of chat "
            "messages."
        )


def _as_messages(part: str | list[Message], role: str) -> list[Message]:
    return part if isinstance(part, list) else [{"role": role, "content": part}] if part else []


def _is_continued(found: Mapping[str, Any], chat: list[Message], answers: list[list[Message]], row: Row) -> bool:
    """Whether the prompt column ends within a turn of the assistant, which the answers then continue.

    In `messages`, two consecutive messages of the assistant are separate turns.
    """
    if "prompt" not in found or not chat or chat[-1]["role"] != "assistant":
        return False
    if any(answer and answer[0]["role"] == "tool" for answer in answers):
        return False
    if chat[-1].get("tool_calls"):
        raise DataError(f"{row.where}: the prompt ends with a tool call; a message of the tool must follow it.")
    return True
