"""Each wrong variant replaces a line of the code, and selects tests that exist."""

import re
import shlex
from pathlib import Path

import pytest

from tests.mutants.__main__ import listed
from tests.processes import ROOT

EVERY = [mutant for _, mutant in listed("")]


@pytest.mark.parametrize("mutant", EVERY, ids=str)
def test_the_replaced_text_occurs_once_in_its_file(mutant):
    assert (ROOT / mutant.file).read_text().count(mutant.old) == 1
    assert mutant.new != mutant.old


@pytest.mark.parametrize("arguments", sorted({mutant.tests for mutant in EVERY}))
def test_the_selected_tests_exist(arguments):
    paths, _, expression = arguments.partition(" -k ")
    sources = {path: _source(ROOT / path.partition("::")[0]) for path in paths.split()}
    for path, source in sources.items():
        _, _, test = path.partition("::")
        assert f"def {test.partition('[')[0]}(" in source if test else source, path
    for word in re.findall(r"\w+", " ".join(shlex.split(expression))):
        assert word in ("or", "and", "not") or word in "".join(sources.values()), word


def _source(path: Path) -> str:
    """The text of a file, or of all Python files in a folder."""
    return "".join(file.read_text() for file in ([path] if path.is_file() else sorted(path.rglob("*.py"))))
