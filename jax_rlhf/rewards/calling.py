"""Calls a reward function with this project's signature or with TRL's, depending on its parameters."""

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
class RewardInputs:
    """A batch of B responses for reward functions to score.

    Attributes:
      prompts: B texts.
      responses: B texts, without special tokens.
      columns: the data set's other columns, B entries each.
      completion_ids: the token ids of each response, with its EOS; None = not available.
      chats: the messages of each prompt, or None for a plain text; None = all prompts are plain texts.
      continued: whether each chat ends within a turn of the assistant that the response continues; None = none does.
      with_special_tokens: (prompts, responses) decoded with special tokens; None = no function asks for them.
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


def arguments(function: Callable, inputs: RewardInputs) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a reward function. They are copies, which the function may modify.

    A function with a parameter `completions`, with `completion_ids` as its first, or with nothing but **, is called as
    in TRL: f(prompts=…, completions=…, completion_ids=…, **columns). For a chat, the prompt is the list of messages,
    and the completion is a list with the assistant's message.

    Every other function is called as f(prompts, responses, **columns). It also gets `messages` and `completion_ids` if
    it has parameters of these names.

    Both kinds get `prompts_with_special_tokens` and `responses_with_special_tokens` if they have such parameters. A
    column is left out if one of these arguments has the same name, or if the function has no parameter for it.

    Args:
      function: the reward function.
      inputs: the responses to score.

    Returns:
      (positional arguments, keyword arguments).
    """
    parameters = _parameters(function)
    named = [name for name, parameter in parameters.items() if parameter.kind in _NAMED]
    takes_all = not parameters or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    columns = {name: copy.deepcopy(list(values)) for name, values in inputs.columns.items()}
    extras: dict[str, Any] = {"completion_ids": [list(ids) for ids in inputs.completion_ids or ()] or None}
    texts = inputs.with_special_tokens or (inputs.prompts, inputs.responses)
    special = {name: list(some) for name, some in zip(_WITH_SPECIAL, texts, strict=True) if name in named}
    columns |= special
    if has_trl_signature(function):
        prompts, completions = _conversations(inputs)
        keywords = columns | {"prompts": prompts, "completions": completions} | extras
        return (), keywords if takes_all else {name: value for name, value in keywords.items() if name in named}
    positional = [name for name, parameter in parameters.items() if parameter.kind in _BY_POSITION][:2]
    keywords = {name: values for name, values in columns.items() if name not in positional}
    extras["messages"] = copy.deepcopy(list(inputs.chats or [None] * len(inputs)))
    keywords |= {name: value for name, value in extras.items() if name in named}
    if not takes_all:
        keywords = {name: value for name, value in keywords.items() if name in named}
    return (list(inputs.prompts), list(inputs.responses)), keywords


def has_trl_signature(function: Callable) -> bool:
    """Whether a function is called with TRL's keyword arguments."""
    parameters = _parameters(function)
    named = [name for name, parameter in parameters.items() if parameter.kind in _NAMED]
    if "responses" in named:
        return False
    alone = bool(parameters) and all(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return alone or "completions" in named or named[:1] == ["completion_ids"]


def asks_for_special_tokens(function: Callable) -> bool:
    """Whether a function has a parameter for texts with special tokens."""
    return not _parameters(function).keys().isdisjoint(_WITH_SPECIAL)


def describe_call(function: Callable, name: str, columns: Mapping[str, Any]) -> str:
    """The call of a function for error messages, such as "f(prompts, responses, answer=…)".

    Args:
      function: the function.
      name: its name in messages.
      columns: the columns of the data set.
    """
    first = ", ".join(f"{keyword}=…" for keyword in _TRL) if has_trl_signature(function) else "prompts, responses"
    return f"{name}({first}{''.join(f', {column}=…' for column in columns)})"


def _parameters(function: Callable) -> Mapping[str, inspect.Parameter]:
    """A function's parameters; none if they cannot be determined, as for a few functions written in C."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}


def _conversations(inputs: RewardInputs) -> tuple[list, list]:
    """Prompts and completions in TRL's format: messages for chats, and the whole turn for a continued turn."""
    prompts, completions, count = [], [], len(inputs)
    chats, continued = inputs.chats or [None] * count, inputs.continued or [False] * count
    for prompt, response, chat, continues in zip(inputs.prompts, inputs.responses, chats, continued, strict=True):
        if chat is None:
            prompts.append(prompt)
            completions.append(response)
            continue
        chat = copy.deepcopy(chat)
        beginning = chat.pop()["content"] if continues else ""
        prompts.append(chat)
        completions.append([{"role": "assistant", "content": beginning + response}])
    return prompts, completions
