"""The command `jax-rlhf`: `run` (the default), `plan`, `chat`, `verify`.

This module imports neither JAX nor any other large library, so that `jax-rlhf --help` is fast.
"""

import importlib
import re
import sys
import textwrap
from collections.abc import Iterator
from typing import NamedTuple

from absl import flags

from jax_rlhf.cli import run_flags
from jax_rlhf.cli.packaged import packaged_configs
from jax_rlhf.cli.reference import Field, all_fields, value_text
from jax_rlhf.io.printable import printable

_WIDTH = 100
_HELP = re.compile(r"-h|--?help(short|full)?")


class Command(NamedTuple):
    """A subcommand.

    Attributes:
      module: the module with its function `run`.
      usage: its arguments.
      summary: a short description.
    """

    module: str
    usage: str
    summary: str


COMMANDS = {
    "run": Command(
        "jax_rlhf.cli.run",
        "--config=FILE_OR_NAME --workdir=DIR [--config.FIELD=VALUE …]",
        "run the phases of config.phases (the default command)",
    ),
    "plan": Command(
        "jax_rlhf.plan.__main__",
        "--config=FILE_OR_NAME --topology=v5p:2x2x4 [--config.FIELD=VALUE …]",
        "compile a run for hardware that is not present, and report its memory and cost",
    ),
    "chat": Command("jax_rlhf.chat", "MODEL", "chat with a model"),
    "verify": Command("jax_rlhf.verify", "WORKDIR", "check every checkpoint and model of a run for damage"),
}


def run() -> None:
    """The console command: reads the subcommand from sys.argv, and runs it."""
    program, *arguments = sys.argv
    name = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "run"
    if name not in COMMANDS:
        print(
            f"error: {printable(name)!r} is not a command; the commands are {', '.join(COMMANDS)}. "
            "jax-rlhf --help lists them with their flags.",
            file=sys.stderr,
        )
        sys.exit(2)
    if any(_HELP.fullmatch(argument) for argument in arguments):
        print(help_text() if name == "run" else command_help(name))
        return
    sys.argv = [program, *arguments]
    importlib.import_module(COMMANDS[name].module).run()


def help_text() -> str:
    """The output of `jax-rlhf --help`: the commands, the flags of `run`, and every setting with its default."""
    lines = ["usage: jax-rlhf [COMMAND] ARGUMENTS", "", "commands:"]
    for name, command in COMMANDS.items():
        lines += _entry(f"{name} {command.usage}", command.summary)
    lines += ["", "flags of run:"]
    lines += _entry("--config=FILE_OR_NAME", f"A config file, or a packaged config: {', '.join(packaged_configs())}.")
    lines += _flags(run_flags.__name__)
    lines += ["", "settings, each as --config.FIELD=VALUE:"]
    lines += _settings(all_fields())
    return "\n".join(lines)


def command_help(name: str) -> str:
    """The output of `jax-rlhf NAME --help` for `plan`, `chat` and `verify`: usage, description, flags."""
    command = COMMANDS[name]
    doc = importlib.import_module(command.module).__doc__ or ""
    lines = [f"usage: jax-rlhf {name} {command.usage}", "", doc.strip()]
    found = _flags(command.module)
    return "\n".join([*lines, "", "flags:", *found] if found else lines)


def _flags(module: str) -> list[str]:
    """The help of the absl flags that a module defines, as lines."""
    lines = []
    for flag in flags.FLAGS.flags_by_module_dict().get(module, ()):
        lines += _entry(f"--{flag.name}={'' if flag.default is None else flag.default}", flag.help)
    return lines


def _settings(fields: tuple[Field, ...]) -> Iterator[str]:
    for field in fields:
        if not field.fields:
            yield from _entry(f"--config.{field.path}={value_text(field.default)}", field.doc)
    for field in fields:
        if field.fields:
            yield from ("", f"config.{field.path}: {field.doc}")
            yield from _settings(field.fields)


def _entry(name: str, text: str) -> list[str]:
    indent = " " * 6
    return [f"  {name}", *textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=indent)]
