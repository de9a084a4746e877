"""Chats: reads messages in the formats of common data sets, and renders them with the tokenizer's chat template."""

import dataclasses
import inspect
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from jax_rlhf.data.data_error import DataError
from jax_rlhf.data.special_tokens import MARK, check_marks, special_around

Message = dict[str, Any]

_SHARE_GPT = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
"""`from` in ShareGPT's {"from", "value"} → the role."""
_ROLES = {*_SHARE_GPT.values(), *["developer", "ipython", "function", "observation", "environment", "critic", "model"]}
"""Roles that chat templates know. Special tokens may be named after them (<|user|>)."""
_NAME = re.compile(r"[^<>|\[\]{}\r\n]{1,200}")
_SAME_ROLES = ("human", "gpt", "chatgpt", "bing", "bard", "model", "bot")
"""ShareGPT's role names that are translated in {"role", "content"} too; others (developer, ipython …) are passed to
the template unchanged."""
_REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message under which data sets keep the reasoning before an answer."""
_RESERVED = {"messages", *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters}
"""Names that a row's template options may not have: the arguments of the call itself, such as `chat_template`."""


@dataclasses.dataclass(frozen=True)
class Rendering:
    """Renders the chats of one row with the tokenizer's chat template.

    Attributes:
      tokenizer: has the chat template.
      where: the row's file and line, for error messages.
      tools: JSON schemas of the tools that the assistant may call; None = none.
      options: keyword arguments of the template, such as `enable_thinking`.
      has_marks: the texts of special tokens are marked in the messages (`special_tokens.py`).
    """

    tokenizer: PreTrainedTokenizerBase
    where: str
    tools: list | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    has_marks: bool = False

    def __call__(self, messages: list[Message], **flags: bool) -> str:
        """The text of a chat; DataError if the template fails. `flags` are arguments of `apply_chat_template`."""
        try:
            rendering = self.tokenizer.apply_chat_template(
                messages, tools=self.tools, tokenize=False, **flags, **self.options
            )
            text = cast(str, rendering)  # since tokenize=False
            if self.has_marks:
                check_marks(text, self.tokenizer)
            return text
        except Exception as error:  # the template is part of the checkpoint; it and jinja raise any type
            raise DataError(f"{self.where}: the chat template fails: {type(error).__name__}: {error}") from error


def checked_messages(part: list, where: str) -> list[Message]:
    """Converts chat messages to one format: {"role", "content"}, and other keys that the template may read.

    It also reads OpenAI's format (content null or absent beside `tool_calls`, content as a list of text parts,
    arguments as JSON) and ShareGPT's ({"from", "value"}). Keys with the value None are removed: data sets use None as
    filler.

    Args:
      part: the list of messages.
      where: the row's file and line, for error messages.

    Returns:
      The messages; `content` is a string in each.

    Raises:
      DataError: an entry of the list is not a message.
    """
    return [_checked_message(message, where) for message in part]


def _checked_message(message: Any, where: str) -> Message:
    wrong = DataError(f'{where}: {str(message)[:80]} is not a chat message {{"role": …, "content": …}}.')
    if not isinstance(message, dict):
        raise wrong
    if "role" not in message and isinstance(message.get("from"), str):
        role = _SHARE_GPT.get(message["from"].lower())
        if role is None:
            raise DataError(f"{where}: a message is from {message['from']!r}; known are {', '.join(_SHARE_GPT)}.")
        others = {key: value for key, value in message.items() if key not in ("from", "value")}
        message = others | {"role": role, "content": message.get("value")}
    kept = {key: value for key, value in message.items() if value is not None}
    if not isinstance(kept.get("role"), str):
        raise wrong
    if kept["role"].lower() in _SAME_ROLES:
        kept["role"] = _SHARE_GPT[kept["role"].lower()]
    content = kept.get("content")
    if isinstance(content, list):
        content = _joined(content, where)
    calls = kept.get("tool_calls")
    if calls:
        kept["tool_calls"] = [_checked_call(call, where) for call in _list(calls, "tool_calls", where)]
    else:
        kept.pop("tool_calls", None)
    if content is None and not calls and not any(kept.get(key) for key in _REASONING):
        raise wrong
    if content is not None and not isinstance(content, str):
        raise wrong
    return kept | {"content": content or ""}


def _joined(parts: list, where: str) -> str:
    """The text of a `content` that is a list of text parts."""
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise DataError(f"{where}: a message has a part of type {kind!r}; only text parts are supported.")
    return "".join(part["text"] for part in parts)


def _checked_call(call: Any, where: str) -> Any:
    """A tool call with its arguments as an object: templates dump them as JSON, and would quote a JSON string again."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict | None):
        raise DataError(f"{where}: {str(call)[:80]} in tool_calls, or its function, is not an object.")
    if function is not None:
        return call | {"function": _checked_call(function, where)}
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        try:
            read = json.loads(arguments)
        except (ValueError, RecursionError):
            return call
        return call | {"arguments": read} if isinstance(read, dict) else call
    return call


def _list(value: Any, name: str, where: str) -> list:
    if not isinstance(value, list):
        raise DataError(f"{where}: {name} is of type {type(value).__name__}; it must be a list.")
    return value


def check_names(
    chats: Sequence[list[Message]], options: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, where: str
) -> None:
    """Checks that no role, name or option can form a special token with the text that a template puts around it.

    Args:
      chats: lists of messages, without marks.
      options: keyword arguments of the template.
      tokenizer: has the special tokens.
      where: the row's file and line, for error messages.

    Raises:
      DataError: one of them is the inner part of a special token, or is not a valid role or name.
    """
    taken = options.keys() & {*tokenizer.SPECIAL_TOKENS_ATTRIBUTES, *tokenizer.special_tokens_map}
    if taken:
        raise DataError(
            f"{where}: chat_template_kwargs sets {sorted(taken)[0]}, which only the tokenizer may set; remove it."
        )
    names = [("option", value) for value in options.values() if isinstance(value, str)]
    for message in itertools.chain(*chats):
        names += [(key, message[key]) for key in ("role", "name") if isinstance(message.get(key), str)]
    for kind, name in dict.fromkeys(names):
        if name in _ROLES:
            continue
        special = special_around(name, tokenizer)
        if special:
            raise DataError(
                f"{where}: the {kind} {name[:80]!r} is a part of the special token {special!r}, which a template could "
                "complete; rename it."
            )
        if kind != "option" and not _NAME.fullmatch(name):
            raise DataError(
                f"{where}: the {kind} {name[:80]!r} is empty, too long, or has line breaks or one of <>|[]{{}}; rename "
                "it."
            )


def tools_of(value: Any, where: str) -> list | None:
    """The tools of a row; None if it has none.

    Args:
      value: a list of JSON schemas, or that list as JSON; None, [] and "" = none.
      where: the row's file and line, for error messages.

    Raises:
      DataError: the value is neither.
    """
    value = from_json(value)
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError(f"{where}: tools is {str(value)[:80]!r}; it must be a list of JSON schemas, or its JSON.")
    return value


def template_options(value: Any, where: str) -> dict[str, Any]:
    """A row's keyword arguments for the chat template.

    Args:
      value: an object, or its JSON; None = none.
      where: the row's file and line, for error messages.

    Raises:
      DataError: the value is not an object, or has a name that `apply_chat_template` itself uses.
    """
    value = from_json(value) or {}
    if not isinstance(value, dict) or any(name in _RESERVED for name in value):
        raise DataError(
            f"{where}: chat_template_kwargs is {str(value)[:80]!r}; it must be an object of the template's options."
        )
    return {name: option for name, option in value.items() if option is not None}


def from_json(value: Any) -> Any:
    """Parses the value of a column that formats such as CSV can only store as a string.

    Returns:
      The parsed value of a string that is JSON, None for a blank string, and any other value unchanged.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        return value


def rendered(
    render: Rendering, prompt: list[Message], answers: Sequence[list[Message]], *, continued: bool
) -> tuple[str, tuple[str, ...], str]:
    """Renders a prompt and its answers with the chat template.

    Args:
      render: the row's rendering.
      prompt: messages before the answer; [] = none.
      answers: the messages of each answer.
      continued: the prompt ends within a turn of the assistant, and the answers continue that turn.

    Returns:
      (prompt, answers, omitted). A prompt and one of its answers make the text of the whole conversation; an answer
      without content is "". `omitted` is a part of an answer that the template leaves out, so that it would not be
      learned, or "".

    Raises:
      DataError: the template fails, or renders the prompt differently when an answer follows.
    """
    if continued:
        with_turn = render(prompt, continue_final_message=True)
        conversations = [[*prompt[:-1], *_continued(prompt[-1], answer)] for answer in answers]
    else:
        with_turn = render(prompt, add_generation_prompt=True) if prompt else ""
        conversations = [[*prompt, *answer] for answer in answers]
    if not answers:
        return with_turn, (), ""
    alone = render(prompt) if prompt else ""
    texts = [render(conversation) for conversation in conversations]
    begin = common_beginning([with_turn, *texts]) if prompt else ""
    # Without a generation prompt a template may close the conversation; that closing text is not part of the prompt.
    if prompt and not begin.startswith(common_beginning([alone, with_turn])):
        raise DataError(
            f"{render.where}: the chat template renders the prompt differently when an answer follows it, so that the "
            "prompt of PPO would not be the prompt of training; change chat_template.jinja in the checkpoint's folder."
        )
    both = list(zip(texts, answers, strict=True))
    completions = tuple(text[len(begin) :] if any(map(_has_content, answer)) else "" for text, answer in both)
    # Search behind the prompt only: the list of tools in the prompt has the names of functions too.
    written = [text[len(common_beginning([alone, text])) :] for text in texts]
    return begin, completions, next(filter(None, map(_omitted_part, written, answers)), "")


def _continued(last: Message, answer: list[Message]) -> list[Message]:
    """The prompt's last message, continued by the answer's first message; then the answer's other messages."""
    if not answer:
        return [last]
    first, *others = answer
    return [last | first | {"content": last["content"] + first["content"]}, *others]


def _has_content(message: Message) -> bool:
    return bool(message["content"].strip() or message.get("tool_calls"))


def writes_tools(render: Rendering, chat: list[Message]) -> bool:
    """Whether the chat template renders the row's tools, and the tool calls in the prompt.

    Args:
      render: the row's rendering, with its tools.
      chat: the prompt's messages.
    """
    bare = [{key: value for key, value in message.items() if key != "tool_calls"} for message in chat]
    text, without_tools = render(chat), dataclasses.replace(render, tools=None)
    if render.tools and without_tools(chat) == text:
        return False
    try:
        return bare == chat or render(bare) != text
    except DataError:  # the template fails without them, so it reads them
        return True


def _omitted_part(written: str, answer: list[Message]) -> str:
    """A part of the assistant's content, reasoning or tool calls that the rendered text lacks; ignores white space."""
    written = _without_space(written)
    for message in answer:
        parts = [message["content"], *(message[key] for key in _REASONING if isinstance(message.get(key), str))]
        calls = (call.get("function") or call for call in message.get("tool_calls", ()))
        parts += [call["name"] for call in calls if isinstance(call.get("name"), str)]
        for part in parts if message["role"] == "assistant" else ():
            if _without_space(part) not in written:
                return part
    return ""


def _without_space(text: str) -> str:
    return "".join(text.split())


def common_beginning(texts: Sequence[str]) -> str:
    """The longest common prefix of one or more texts."""
    first, last = min(texts), max(texts)
    return first[: common_length(first, last)].removesuffix(MARK)  # a mark must not be separated from its number


def common_length(one: Sequence, other: Sequence) -> int:
    """The length of the common prefix of two strings or lists, found by bisection."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
