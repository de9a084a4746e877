"""How a reward function is called: in this project's form, or in TRL's, whichever its parameters say."""

import copy
import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_WITH_SPECIAL = ("prompts_with_special_tokens", "responses_with_special_tokens")
_TRL = ("prompts", "completions", "completion_ids")


@dataclasses.dataclass(frozen=True)
class Answers:
    """What reward functions score.

    Attributes:
      prompts: B texts.
      responses: B texts, without special tokens.
      columns: the data set's other columns, B entries each.
      completion_ids: the ids of each response, its EOS included; None = not known.
      chats: the messages of each prompt, None where it is a plain text; None = all are.
      with_special_tokens: prompts and responses once more, special tokens among them; None = no function asked.
      continued: the chat ends within a turn of the assistant, which the response goes on with; None = none does.
    """

    prompts: Sequence[str]
    responses: Sequence[str]
    columns: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    completion_ids: Sequence[Sequence[int]] | None = None
    chats: Sequence[list[dict[str, Any]] | None] | None = None
    continued: Sequence[bool] | None = None
    with_special_tokens: tuple[Sequence[str], Sequence[str]] | None = None

    def __len__(self) -> int:
        """B."""
        return len(self.responses)


def arguments(function: Callable, answers: Answers) -> tuple[tuple, dict[str, Any]]:
    """What a function is called with: copies, so that it may sort or pop them.

    A function with a parameter `completions` or `completion_ids`, or with ** alone, is called as TRL calls it:
    f(prompts=…, completions=…, completion_ids=…, **columns), where a chat's prompt is its messages and its completion a
    list with the assistant's message. All others are called as f(prompts, responses, **columns); one with a parameter
    `messages` or `completion_ids` has those too, and one of either form with a parameter `prompts_with_special_tokens`
    or `responses_with_special_tokens` has those. A column whose name is taken by these is left out, and so is a column
    that the function has no parameter for.

    Args:
      function: the function.
      answers: what it scores.

    Returns:
      (positional arguments, keyword arguments).
    """
    parameters = _parameters(function)
    named = [name for name, parameter in parameters.items() if parameter.kind in _NAMED]
    takes_all = not parameters or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    columns = {name: copy.deepcopy(list(values)) for name, values in answers.columns.items()}
    more: dict[str, Any] = {"completion_ids": [list(ids) for ids in answers.completion_ids or ()] or None}
    texts = answers.with_special_tokens or (answers.prompts, answers.responses)
    special = {name: list(some) for name, some in zip(_WITH_SPECIAL, texts, strict=True) if name in named}
    columns |= special
    if in_trl_form(function):
        prompts, completions = _conversations(answers)
        given = columns | {"prompts": prompts, "completions": completions} | more
        return (), given if takes_all else {name: value for name, value in given.items() if name in named}
    places = [name for name, parameter in parameters.items() if parameter.kind in _BY_POSITION][:2]
    given = {name: values for name, values in columns.items() if name not in places}
    more["messages"] = copy.deepcopy(list(answers.chats or [None] * len(answers)))
    given |= {name: value for name, value in more.items() if name in named}
    if not takes_all:
        given = {name: value for name, value in given.items() if name in named}
    return (list(answers.prompts), list(answers.responses)), given


def in_trl_form(function: Callable) -> bool:
    """Whether a function wants TRL's keywords.

    Args:
      function: the function.

    Returns:
      Whether.
    """
    parameters = _parameters(function)
    named = [name for name, parameter in parameters.items() if parameter.kind in _NAMED]
    if "responses" in named:
        return False
    alone = bool(parameters) and all(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return alone or "completions" in named or named[:1] == ["completion_ids"]


def asks_for_special_tokens(function: Callable) -> bool:
    """Whether a function has a parameter for texts with special tokens.

    Args:
      function: the function.

    Returns:
      Whether.
    """
    return not _parameters(function).keys().isdisjoint(_WITH_SPECIAL)


def call_in_words(function: Callable, name: str, columns: Mapping[str, Any]) -> str:
    """How a function is called, for messages.

    Args:
      function: the function.
      name: its name.
      columns: the data set's.

    Returns:
      Such as "f(prompts, responses, answer=…)".
    """
    first = ", ".join(f"{keyword}=…" for keyword in _TRL) if in_trl_form(function) else "prompts, responses"
    return f"{name}({first}{''.join(f', {column}=…' for column in columns)})"


def _parameters(function: Callable) -> Mapping[str, inspect.Parameter]:
    """A function's parameters; none where Python cannot say, as of a few written in C."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}


def _conversations(answers: Answers) -> tuple[list, list]:
    """Prompts and completions as TRL has them: of chats messages, and of a turn that is continued the whole turn."""
    prompts, completions, count = [], [], len(answers)
    chats, continued = answers.chats or [None] * count, answers.continued or [False] * count
    for prompt, response, chat, goes_on in zip(answers.prompts, answers.responses, chats, continued, strict=True):
        if chat is None:
            prompts.append(prompt)
            completions.append(response)
            continue
        chat = copy.deepcopy(chat)
        begun = chat.pop()["content"] if goes_on else ""
        prompts.append(chat)
        completions.append([{"role": "assistant", "content": begun + response}])
    return prompts, completions
