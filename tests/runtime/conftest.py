"""The whole run that tests of what it left look at, too."""

from tests.cli.conftest import whole  # noqa: F401
