"""A run of all three phases, made once and shared by the tests that read its files."""

import pytest

from tests.cli import test_end_to_end as alone
from tests.shared import made_once


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The workdir and the stdout of a run of all three phases."""

    def make(folder):
        code, printed, errors = alone.run(folder)
        assert code == 0, errors[-4000:]
        (folder / "printed").write_text(printed)

    folder = made_once(tmp_path_factory, "whole", make)
    return folder / "run", (folder / "printed").read_text()
