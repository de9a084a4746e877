"""The command `jax-rlhf`: which subcommand runs with which arguments, and what --help prints."""

import sys
import types

import pytest

from jax_rlhf.cli import main
from jax_rlhf.cli.reference import all_fields


@pytest.fixture
def ran(monkeypatch):
    """A list of (module, arguments) of each subcommand that was called. Its module is replaced, so nothing runs."""
    calls = []

    def module(name):
        return types.SimpleNamespace(run=lambda: calls.append((name, sys.argv)), __doc__="What it does.")

    monkeypatch.setattr(main.importlib, "import_module", module)
    return calls


@pytest.mark.parametrize(
    ("arguments", "module", "left"),
    [
        (["--config=ppo", "--workdir=x"], "jax_rlhf.cli.run", ["--config=ppo", "--workdir=x"]),
        (["run", "--config=ppo"], "jax_rlhf.cli.run", ["--config=ppo"]),
        (
            ["plan", "--config=ppo", "--topology=h100:8"],
            "jax_rlhf.plan.__main__",
            ["--config=ppo", "--topology=h100:8"],
        ),
        (["chat", "plan"], "jax_rlhf.chat", ["plan"]),  # here "plan" is the folder of a model
        (["verify", "runs/own"], "jax_rlhf.verify", ["runs/own"]),
        ([], "jax_rlhf.cli.run", []),
        (["--config", "plan"], "jax_rlhf.cli.run", ["--config", "plan"]),
    ],
)
def test_the_first_argument_is_the_subcommand(ran, monkeypatch, arguments, module, left):
    monkeypatch.setattr(sys, "argv", ["jax-rlhf", *arguments])
    main.run()
    assert ran == [(module, ["jax-rlhf", *left])]


@pytest.mark.parametrize("name", ["verfiy", "train", "runs/own", "verify\x1b[2J"])
def test_an_unknown_command_is_an_error_that_lists_the_commands(ran, monkeypatch, capsys, name):
    monkeypatch.setattr(sys, "argv", ["bin/jax-rlhf", name, "--config=ppo"])
    with pytest.raises(SystemExit) as ended:
        main.run()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert f"{name.partition(chr(27))[0]}" in error
    assert "is not a command; the commands are run, plan, chat, verify. jax-rlhf --help" in error
    assert "\x1b" not in error
    assert ran == []


@pytest.mark.parametrize("flag", ["--help", "-h", "-help", "--helpfull", "--helpshort"])
def test_help_runs_nothing(ran, monkeypatch, capsys, flag):
    for arguments in ([flag], ["run", flag], ["--config=ppo", flag]):
        monkeypatch.setattr(sys, "argv", ["jax-rlhf", *arguments])
        main.run()
        assert capsys.readouterr().out.startswith("usage: jax-rlhf [COMMAND]")
    monkeypatch.setattr(sys, "argv", ["jax-rlhf", "verify", flag])
    main.run()
    assert capsys.readouterr().out == "usage: jax-rlhf verify WORKDIR\n\nWhat it does.\n"
    assert ran == []


def flat(fields):
    for field in fields:
        yield field
        yield from flat(field.fields)


def test_help_lists_all_flags_and_settings_with_default_and_meaning():
    lines = main.help_text().splitlines()
    assert "  --config.ppo.kl.coef=0.05" in lines
    assert '  --config.phases=("sft", "reward", "ppo")' in lines
    assert "  --process_timeout=100" in lines
    assert "  --workdir=" in lines
    text = " ".join(main.help_text().split())
    for field in flat(all_fields()):
        name = f"config.{field.path}:" if field.fields else f"--config.{field.path}={main.value_text(field.default)}"
        assert f"{name} {' '.join(field.doc.split())}" in text, field.path
    for name, command in main.COMMANDS.items():
        assert f"  {name} {command.usage}" in lines
    assert max(map(len, lines)) <= 120


def test_help_of_a_subcommand_lists_its_flags():
    text = main.command_help("chat")
    assert text.startswith("usage: jax-rlhf chat MODEL\n")
    assert "  --max_new_tokens=256\n" in text
