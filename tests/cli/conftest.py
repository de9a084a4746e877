"""A whole run, once for all tests that look at what it left."""

import pytest

from tests.cli import test_end_to_end as alone
from tests.shared import made_once


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A whole run: its folder and what it printed."""

    def make(folder):
        code, printed, errors = alone.run(folder)
        assert code == 0, errors[-4000:]
        (folder / "printed").write_text(printed)

    folder = made_once(tmp_path_factory, "whole", make)
    return folder / "run", (folder / "printed").read_text()
