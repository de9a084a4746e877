"""Chats: lists of messages in the forms that data sets have, and what a tokenizer's chat template makes of them."""

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
"""Who speaks in ShareGPT's {"from", "value"}, and what the role is called here."""
_ROLES = {*_SHARE_GPT.values(), *["developer", "ipython", "function", "observation", "environment", "critic", "model"]}
"""Roles that templates know, and that tokens are named after (<|user|>)."""
_NAME = re.compile(r"[^<>|\[\]{}\r\n]{1,200}")
_SAME_ROLES = ("human", "gpt", "chatgpt", "bing", "bard", "model", "bot")
"""Roles of {"role", "content"} that are ShareGPT's; others (developer, ipython …) are the template's matter."""
_REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message under which data sets keep what was thought before an answer."""
_RESERVED = {"messages", *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters}
"""What a row's options for the template may not be called: the call's own, its template among them."""


@dataclasses.dataclass(frozen=True)
class Rendering:
    """How a row's chats are written out.

    Attributes:
      tokenizer: whose chat template.
      where: of the row, for messages.
      tools: that the assistant may call, as JSON schemas; None = none.
      options: keywords for the template, such as `enable_thinking`.
      has_marks: special tokens' texts in the messages are marked.
    """

    tokenizer: PreTrainedTokenizerBase
    where: str
    tools: list | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    has_marks: bool = False

    def __call__(self, messages: list[Message], **how: bool) -> str:
        """The text of a chat; DataError where the template raises."""
        try:
            made = self.tokenizer.apply_chat_template(messages, tools=self.tools, tokenize=False, **how, **self.options)
            text = cast(str, made)
            if self.has_marks:
                check_marks(text, self.tokenizer)
            return text
        except Exception as error:  # the template is the checkpoint's; jinja and it raise what they like
            raise DataError(f"{self.where}: the chat template fails: {type(error).__name__}: {error}") from error


def checked_messages(part: list, where: str) -> list[Message]:
    """Chat messages in one form: {"role", "content"} and what else the template may read.

    OpenAI's (content null or absent beside `tool_calls`, content in text parts, arguments as JSON) and ShareGPT's
    ({"from", "value"}) are read too. Keys that are None are left out: data sets fill up with them.

    Args:
      part: a list.
      where: of the row, for messages.

    Returns:
      The messages; `content` is a text in each.

    Raises:
      DataError: something else than a message is in the list.
    """
    return [_checked_message(message, where) for message in part]


def _checked_message(message: Any, where: str) -> Message:
    wrong = DataError(f'{where}: {str(message)[:80]} is no chat message {{"role": …, "content": …}}.')
    if not isinstance(message, dict):
        raise wrong
    if "role" not in message and isinstance(message.get("from"), str):
        role = _SHARE_GPT.get(message["from"].lower())
        if role is None:
            raise DataError(f"{where}: {message['from']!r} speaks in a message; {', '.join(_SHARE_GPT)} are known.")
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
    """The text of a content that is a list of parts."""
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise DataError(f"{where}: a message has a part of type {kind!r}; texts alone can be read.")
    return "".join(part["text"] for part in parts)


def _checked_call(call: Any, where: str) -> Any:
    """A tool call whose arguments are an object: templates write them as JSON, and would write a text in quotes."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict | None):
        raise DataError(f"{where}: {str(call)[:80]} in tool_calls is no object, or its function is none.")
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
        raise DataError(f"{where}: {name} is a {type(value).__name__}; a list is expected.")
    return value


def check_names(
    chats: Sequence[list[Message]], options: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, where: str
) -> None:
    """Whether a role, a name or an option makes a special token of what a template writes around it.

    Args:
      chats: the messages of each, without marks.
      options: of the template.
      tokenizer: whose special tokens.
      where: of the row, for messages.

    Raises:
      DataError: one is the inside of a special token, or not what a role or name is.
    """
    taken = options.keys() & {*tokenizer.SPECIAL_TOKENS_ATTRIBUTES, *tokenizer.special_tokens_map}
    if taken:
        raise DataError(f"{where}: chat_template_kwargs sets the tokenizer's own {sorted(taken)[0]}.")
    names = [("option", value) for value in options.values() if isinstance(value, str)]
    for message in itertools.chain(*chats):
        names += [(key, message[key]) for key in ("role", "name") if isinstance(message.get(key), str)]
    for kind, name in dict.fromkeys(names):
        if name in _ROLES:
            continue
        special = special_around(name, tokenizer)
        if special:
            raise DataError(
                f"{where}: the {kind} {name[:80]!r} stands within the special token {special!r}, which a template "
                "could make of it; rename it."
            )
        if kind != "option" and not _NAME.fullmatch(name):
            raise DataError(f"{where}: the {kind} {name[:80]!r} is no name: it has line breaks, or one of <>|[]{{}}.")


def tools_of(value: Any, where: str) -> list | None:
    """The tools of a row.

    Args:
      value: a list of JSON schemas, or its JSON; None, [] and "" = none.
      where: of the row, for messages.

    Returns:
      The list; None where there are none.

    Raises:
      DataError: it is neither.
    """
    value = from_json(value)
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError(f"{where}: tools holds {str(value)[:80]!r}; a list of JSON schemas, or its JSON, is expected.")
    return value


def template_options(value: Any, where: str) -> dict[str, Any]:
    """Keywords that a row has for the chat template.

    Args:
      value: an object, or its JSON; None = none.
      where: of the row, for messages.

    Returns:
      name → value.

    Raises:
      DataError: it is no object, or has a name that the call itself uses.
    """
    value = from_json(value) or {}
    if not isinstance(value, dict) or any(name in _RESERVED for name in value):
        raise DataError(f"{where}: chat_template_kwargs holds {str(value)[:80]!r}; an object of options is expected.")
    return {name: option for name, option in value.items() if option is not None}


def from_json(value: Any) -> Any:
    """What a column holds that a file can only hold as a text.

    Args:
      value: of the column.

    Returns:
      The JSON's content where it is JSON, None where it is blank, else the value as it is.
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
    """A prompt and its answers as the template writes them.

    Args:
      render: how.
      prompt: messages before the answer; [] = none.
      answers: the messages of each.
      continued: the prompt ends within a turn of the assistant, which the answers go on with.

    Returns:
      (prompt, answers, part): prompt and answer together are the whole text; an answer that says nothing is "". The
      part is one of an answer that the template does not write, or "": it would not be learned.

    Raises:
      DataError: the template fails, or writes the prompt in another way once there is an answer.
    """
    if continued:
        asked = render(prompt, continue_final_message=True)
        wholes = [[*prompt[:-1], *_continued(prompt[-1], answer)] for answer in answers]
    else:
        asked = render(prompt, add_generation_prompt=True) if prompt else ""
        wholes = [[*prompt, *answer] for answer in answers]
    if not answers:
        return asked, (), ""
    told = render(prompt) if prompt else ""
    texts = [render(whole) for whole in wholes]
    begin = common_beginning([asked, *texts]) if prompt else ""
    # What the template ends a conversation with, where no answer is asked for, is no part of the prompt.
    if prompt and not begin.startswith(common_beginning([told, asked])):
        raise DataError(f"{render.where}: once there is an answer, the chat template writes the prompt in another way.")
    both = list(zip(texts, answers, strict=True))
    completions = tuple(text[len(begin) :] if any(map(_says, answer)) else "" for text, answer in both)
    # A name may stand in the prompt too, where the tools are listed.
    written = [text[len(common_beginning([told, text])) :] for text in texts]
    return begin, completions, next(filter(None, map(_left_out, written, answers)), "")


def _continued(last: Message, answer: list[Message]) -> list[Message]:
    """The prompt's last message, with the answer's first one as its end."""
    if not answer:
        return [last]
    first, *others = answer
    return [last | first | {"content": last["content"] + first["content"]}, *others]


def _says(message: Message) -> bool:
    return bool(message["content"].strip() or message.get("tool_calls"))


def writes_tools(render: Rendering, chat: list[Message]) -> bool:
    """Whether a chat template writes the tools that there are, and the calls of them in a prompt.

    Args:
      render: how, its tools among it.
      chat: the prompt's messages.

    Returns:
      Whether.
    """
    bare = [{key: value for key, value in message.items() if key != "tool_calls"} for message in chat]
    text, without_tools = render(chat), dataclasses.replace(render, tools=None)
    if render.tools and without_tools(chat) == text:
        return False
    try:
        return bare == chat or render(bare) != text
    except DataError:  # it looks for them
        return True


def _left_out(written: str, answer: list[Message]) -> str:
    """What a template does not write of what the assistant said, or thought; white space aside."""
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
    """What all begin with.

    Args:
      texts: one or more.

    Returns:
      The longest text that each begins with.
    """
    first, last = min(texts), max(texts)
    return first[: agreeing(first, last)].removesuffix(MARK)  # with which a number goes


def agreeing(one: Sequence, other: Sequence) -> int:
    """How many characters or messages are the same from the beginning on, found by halving.

    Args:
      one, other: texts, or lists.

    Returns:
      Their number.
    """
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
