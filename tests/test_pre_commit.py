"""The pre-commit hooks use the same tools as the tests."""

import yaml
from packaging.requirements import Requirement

from tests.processes import ROOT


def pinned(package):
    """The versions of a package that the hooks install."""
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    found = [Requirement(line) for hook in hooks for line in hook["additional_dependencies"]]
    return [str(requirement.specifier) for requirement in found if requirement.name == package]


def test_the_hooks_pin_one_ruff_version_that_the_tests_allow():
    lines = (ROOT / "requirements-dev.txt").read_text().splitlines()
    (required,) = (Requirement(line.partition("  #")[0]) for line in lines if line.startswith("ruff"))
    (version,) = set(pinned("ruff"))
    assert len(pinned("ruff")) == 2  # check and format
    assert version.startswith("==")
    assert version.removeprefix("==") in required.specifier
