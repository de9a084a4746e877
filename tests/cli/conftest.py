"""A whole run, once for all tests that look at what it left."""

import pytest

from tests.cli import test_end_to_end as alone


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A whole run: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    code, printed, errors = alone.run(folder)
    assert code == 0, errors[-4000:]
    return folder / "run", printed
