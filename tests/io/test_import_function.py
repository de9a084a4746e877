"""Importing a function by name, from a module or a file."""

import re

import pytest

from jax_rlhf.io.import_function import NotAFunctionError, import_function, is_function_name


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "with: colon" / "my-rewards.py"
    path.parent.mkdir()
    (path.parent / "neighbour_of_rewards.py").write_text("FACTOR = 3\n")
    path.write_text(
        "import dataclasses\nimport neighbour_of_rewards\n\n"
        "@dataclasses.dataclass\nclass Scale:\n    by: int = neighbour_of_rewards.FACTOR\n\n"
        "def scaled(x):\n    return Scale().by * x\n\nNUMBER = 3\n"
    )
    return path


@pytest.mark.parametrize(
    ("text", "is_name"),
    [
        ("package.module:function", True),
        ("module:Class.method", True),
        ("rewards.py:score", True),
        ("../my folder/rewards.v2.py:score", True),
        ("~/rewards.py:score", True),
        ("module", False),
        ("org/name:configuration", False),
        ("data.jsonl:x", True),  # a module may have this name; data files are looked for first
        ("rewards.py:", False),
        ("rewards.py:2x", False),
        (":score", False),
        ("", False),
    ],
)
def test_function_names_are_recognised_by_their_form(text, is_name):
    assert is_function_name(text) == is_name


def test_a_file_is_executed_once_and_can_import_from_its_folder(file):
    function = import_function(f"{file}:scaled")
    assert function(2) == 6
    assert import_function(f"{file}:scaled") is function
    assert import_function(f"{file.parent / '.' / file.name}:scaled") is function
    # Another process uses this name.
    assert import_function(f"{function.__module__}:{function.__qualname__}") is function


def test_a_relative_path_is_resolved_in_the_working_directory(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    assert import_function("my-rewards.py:scaled")(1) == 3


def test_an_error_names_what_is_missing(file):
    with pytest.raises(ImportError, match=re.escape(f"there is no file {file}x.py")):
        import_function(f"{file}x.py:scaled")
    with pytest.raises(AttributeError, match="other"):
        import_function(f"{file}:other")
    with pytest.raises(NotAFunctionError, match="it is a int, not a function"):
        import_function(f"{file}:NUMBER")
    with pytest.raises(ImportError, match="no_such_module"):
        import_function("no_such_module:f")


def test_a_file_that_failed_is_executed_again_after_a_fix(tmp_path):
    path = tmp_path / "rewards.py"
    path.write_text("def score(x):\n    return x\n\nraise ValueError('broken')\n")
    with pytest.raises(ValueError, match="broken"):
        import_function(f"{path}:score")
    path.write_text("def score(x):\n    return 2 * x\n")
    assert import_function(f"{path}:score")(2) == 4


def test_a_function_of_a_module_is_imported():
    assert import_function("os.path:join")("a", "b") == "a/b"
    assert import_function("pathlib:Path.cwd")().is_absolute()
