import shutil

import pytest

from tests.launch.fakes import World


@pytest.fixture
def world(tmp_path):
    if not shutil.which("git") or not shutil.which("flock"):
        pytest.skip("git, or util-linux's flock, is not installed")
    return World(tmp_path)
