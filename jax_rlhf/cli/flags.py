"""The command line: a config file or the name of a packaged config, flags for its fields, and errors about them."""

import ast
import itertools
import re
import sys
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags, logging
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags.tuple_parser import TupleParser

from jax_rlhf.cli.packaged import error_text, get_config_of, packaged_configs
from jax_rlhf.config import RunConfig
from jax_rlhf.io.paths import local_path
from jax_rlhf.io.printable import printable_lines
from jax_rlhf.settings import list_element_type, suggest_field

USAGE = "usage: jax-rlhf --config=FILE_OR_NAME --workdir=DIR [--config.FIELD=VALUE …]"
_ELEMENT = re.compile(r"""\s*(?:"([^"]*)"|'([^']*)'|([^,]*))\s*(?:,|$)""")
_SPECIFIED = re.compile(r"--?config(=|$)")


class _Written(str):
    """The text of a list on the command line; the field's type decides how it is parsed."""


class _ListParser(TupleParser):
    """Keeps the text; ml_collections' own parser reads it as Python, and fails on paths."""

    def parse(self, argument: Any) -> tuple:
        return (_Written(argument),) if isinstance(argument, str) else super().parse(argument)


config_flags.register_flag_parser_for_type(tuple, _ListParser())
CONFIG = config_flags.DEFINE_config_file("config", help_string="A config file, or the name of a packaged config.")


def _load_config(argument: str) -> tuple[str, ConfigDict]:
    """(the argument for config_flags, the settings) of --config=FILE[:PARAMETER] or --config=NAME."""
    name, colon, parameter = argument.partition(":")
    file, packaged = local_path(name), packaged_configs()
    if not file.is_file():
        if name not in packaged:
            near = [other for other in packaged if other == file.stem]
            hint = (
                f"--config={near[0]} is a packaged config"
                if near
                else f"the packaged configs are {', '.join(packaged)}"
            )
            raise ValueError(f"--config={argument}: {name!r} is not a file; {hint}.")
        file = packaged[name]
    get_config = get_config_of(file)
    try:
        config = get_config(parameter) if colon else get_config()
    except (Exception, SystemExit) as error:  # the file is the user's code
        raise ValueError(error_text(file, error)) from error
    if not isinstance(config, ConfigDict):
        raise ValueError(
            f"{file}: get_config returned a {type(config).__name__}; it must return an ml_collections.ConfigDict."
        )
    return f"{file}{colon}{parameter}", config


# ---- flags ---------------------------------------------------------------------------------------------------------


def parse_flags(arguments: Sequence[str]) -> list[str]:
    """Parses the command line; prints an error and exits with code 2 if it is invalid.

    In a list, each text between commas is an element, also if it looks like a number. An element that contains a comma
    needs quotes.

    Args:
      arguments: sys.argv.

    Returns:
      The arguments that are not flags.
    """
    try:
        return _parsed(list(arguments))
    except (flags.Error, ArithmeticError, AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"{USAGE}\nerror: {printable_lines(str(message))}", file=sys.stderr)
        sys.exit(2)


def _parsed(arguments: list[str]) -> list[str]:
    if not any(re.match(r"--?help", argument) for argument in arguments):
        index = next((i for i, argument in enumerate(arguments) if _SPECIFIED.match(argument)), None)
        if index is None:
            raise ValueError(
                f"--config=FILE_OR_NAME is missing; the packaged configs are {', '.join(packaged_configs())}."
            )
        if "=" not in arguments[index]:
            if index + 1 == len(arguments):
                raise ValueError("--config has no value.")
            arguments[index : index + 2] = [f"--config={arguments[index + 1]}"]
        value, config = _load_config(arguments[index].partition("=")[2])
        arguments[index] = f"--config={value}"
        _check_fields(arguments, config)
    rest = flags.FLAGS(arguments)
    if flags.FLAGS["verbosity"].using_default_value:
        flags.FLAGS.verbosity = logging.WARNING  # at INFO, absl's default, JAX reports each missing backend
    if CONFIG.value is not None:
        _expand_lists(CONFIG.value)
    return rest


def _check_fields(arguments: Sequence[str], config: ConfigDict) -> None:
    """Raises ValueError for the first --config.a.b that is not a field of the config."""
    fields = list(_paths(config))
    for argument in arguments:
        match = re.match(r"--?(no)?config\.([^=]*)", argument)
        if match and match[2] not in fields:
            raise ValueError(f"config.{match[2]} does not exist; {suggest_field(match[2], fields, 'config.')}")


def _paths(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    for name, value in config.items():
        yield prefix + name
        if isinstance(value, ConfigDict):
            yield from _paths(value, f"{prefix}{name}.")


def _expand_lists(config: ConfigDict, kind: type = RunConfig, where: str = "config") -> None:
    """Replaces the text of each list by its elements, parsed by the field's type."""
    hints = typing.get_type_hints(kind)
    for name, value in config.items():
        if name not in hints:
            continue
        if isinstance(value, ConfigDict):
            _expand_lists(value, hints[name], f"{where}.{name}")
        elif isinstance(value, tuple) and any(isinstance(part, _Written) for part in value):
            parts = [_elements(part, list_element_type(hints[name]), f"{where}.{name}") for part in value]
            given = [part for part in parts if part is not None]
            config[name] = tuple(itertools.chain(*given)) if given else None


def _elements(written: str, kind: type, where: str) -> list | None:
    """The elements of a list; None if the text is "None"."""
    text = written.strip()
    if text == "None":
        return None
    if text[:1] in ("(", "["):
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            value = None  # a text that only looks like a tuple or list
        if isinstance(value, tuple | list) and (kind is not str or all(isinstance(part, str) for part in value)):
            return list(value)
    found = [next(filter(None, match.groups()), "") for match in _ELEMENT.finditer(text)]
    found = [element.strip() for element in found if element.strip()]
    try:
        return [kind(element) for element in found]
    except ValueError as error:
        raise ValueError(f"{where}={written!r}: expected numbers separated by commas.") from error
