"""Each wrong variant still stands for a line of the code."""

import pytest

from tests.mutants.__main__ import listed
from tests.processes import ROOT

EVERY = [mutant for _, mutant in listed("")]


@pytest.mark.parametrize("mutant", EVERY, ids=str)
def test_what_it_replaces_stands_in_its_file_once(mutant):
    assert (ROOT / mutant.file).read_text().count(mutant.old) == 1
    assert mutant.new != mutant.old
