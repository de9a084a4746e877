"""Each wrong variant still stands for a line of the code."""

import pytest

from tests.mutants import core, data, recipes, supervised
from tests.processes import ROOT

EVERY = [mutant for module in (core, data, recipes, supervised) for mutant in module.MUTANTS]


@pytest.mark.parametrize("mutant", EVERY, ids=str)
def test_what_it_replaces_stands_in_its_file_once(mutant):
    assert (ROOT / mutant.file).read_text().count(mutant.old) == 1
    assert mutant.new != mutant.old
