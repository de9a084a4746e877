"""Settings: dataclasses that say what fields there are, and the mappings and flags that fill them in."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

from ml_collections import ConfigDict, config_dict

T = TypeVar("T")


def from_mapping(kind: type[T], values: Any, where: str = "config") -> T:
    """A config dataclass from a mapping (a dict, an `ml_collections.ConfigDict`), with every field's type checked.

    Args:
      kind: the dataclass.
      values: the fields that differ from the defaults, nested where the dataclass is; or an instance of `kind`.
      where: what to call it in errors.

    Returns:
      An instance.

    Raises:
      ValueError: an unknown field (with the names nearest to it), or a value of another type.
    """
    if isinstance(values, kind):
        return values
    if not isinstance(values, Mapping) and not hasattr(values, "items"):
        raise ValueError(f"{where} must be a mapping of {kind.__name__}'s fields, not {type(values).__name__}.")
    hints = typing.get_type_hints(kind)
    known = {field.name for field in dataclasses.fields(kind)}
    checked = {}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{where}.{name}: there is no such field; {near_misses(name, known)}")
        checked[name] = _checked(hints[name], value, f"{where}.{name}")
    return kind(**checked)


def near_misses(name: str, known: Iterable[str]) -> str:
    """What may have been meant.

    Args:
      name: what was written.
      known: the names that there are.

    Returns:
      A sentence for a message.
    """
    near = difflib.get_close_matches(name, known, n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"the fields are {', '.join(sorted(known))}."


def _checked(hint: Any, value: Any, where: str) -> Any:
    options = _options(hint)
    if type(None) in options and value in (None, "None"):  # the latter from a flag that is a text
        return None
    for option in options:
        origin = typing.get_origin(option)
        if origin is Literal and value in typing.get_args(option):
            return value
        if origin is tuple:
            items = _items(option, value)
            if items is not None:
                return items
        if dataclasses.is_dataclass(option):
            return from_mapping(option, value, where)
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if isinstance(option, type) and origin is None and type(value) is option:
            return value
    raise ValueError(f"{where}={value!r}: {' or '.join(map(_named, options))} is expected.")


def _options(hint: Any) -> tuple:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _items(option: Any, value: Any) -> tuple | None:
    """The tuple that was meant; None where its items are of another type."""
    kind = typing.get_args(option)[0]
    if kind is str:  # --config.phases=sft,reward arrives as one text
        texts = [value] if isinstance(value, str) else value
        if isinstance(texts, list | tuple) and all(isinstance(text, str) for text in texts):
            return tuple(part.strip() for text in texts for part in text.split(",") if part.strip())
        return None
    if not isinstance(value, list | tuple) or any(isinstance(item, bool) for item in value):
        return None
    if kind is float:
        return tuple(map(float, value)) if all(isinstance(item, int | float) for item in value) else None
    return tuple(value) if all(type(item) is kind for item in value) else None


def _named(option: Any) -> str:
    if typing.get_origin(option) is Literal:
        return " or ".join(map(repr, typing.get_args(option)))
    if typing.get_origin(option) is tuple:
        return f"a tuple of {typing.get_args(option)[0].__name__}"
    return "None" if option is type(None) else getattr(option, "__name__", str(option))


def to_config_dict(settings: Any) -> ConfigDict:
    """A dataclass as the ConfigDict that flags override: each field is there, with its type.

    Args:
      settings: an instance.

    Returns:
      The same values; a field that is None takes a value of its type.
    """
    hints = typing.get_type_hints(type(settings))
    result = ConfigDict()
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            value = to_config_dict(value)
        options = _options(hints[field.name])
        if type(None) in options and not {int, float}.isdisjoint(options):
            value = config_dict.FieldReference(value, field_type=object)  # a flag can say None; `from_mapping` checks
        elif value is None:
            option = next(option for option in options if option is not type(None))
            kind = {Literal: str, tuple: tuple}.get(typing.get_origin(option), option)
            value = config_dict.placeholder(kind)
        result[field.name] = value
    return result
