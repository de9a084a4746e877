"""Makes the fixture `whole`, a run of all three phases, available to these tests."""

from tests.cli.conftest import whole  # noqa: F401
