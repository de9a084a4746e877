"""The hooks before a commit use the tools that the tests use."""

import yaml
from packaging.requirements import Requirement

from tests.processes import ROOT


def pinned(package):
    """The versions of a package that the hooks install."""
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    found = [Requirement(line) for hook in hooks for line in hook["additional_dependencies"]]
    return [str(requirement.specifier) for requirement in found if requirement.name == package]


def test_ruff_has_one_version_and_it_is_in_the_range_of_the_tests():
    lines = (ROOT / "requirements-dev.txt").read_text().splitlines()
    (required,) = (Requirement(line.partition("  #")[0]) for line in lines if line.startswith("ruff"))
    (version,) = set(pinned("ruff"))
    assert len(pinned("ruff")) == 2  # check and format
    assert version.startswith("==")
    assert version.removeprefix("==") in required.specifier
