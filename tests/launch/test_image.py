"""launch/Dockerfile and .dockerignore: what goes into an image, and what never does."""

import fnmatch
import re
import tomllib

import pytest

from tests.processes import ROOT

DOCKERFILE = (ROOT / "launch" / "Dockerfile").read_text()


def goes_along(path):
    """Whether .dockerignore lets a path in: the last pattern that matches it, or a folder that it is in, decides."""
    parts, kept = path.split("/"), True
    paths = ["/".join(parts[: count + 1]) for count in range(len(parts))]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        names = parts if pattern.startswith("**/") else paths
        if pattern and any(fnmatch.fnmatchcase(name, pattern.removeprefix("**/")) for name in names):
            kept = line.startswith("!")
    return kept


def copied():
    return [name for line in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE) for name in line.split()]


def test_what_is_copied_is_there_and_goes_along():
    for pattern in copied():
        found = list(ROOT.glob(pattern))
        assert found, pattern
        assert all(goes_along(str(path.relative_to(ROOT))) for path in found), pattern


def test_it_is_all_that_the_installation_reads():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    dynamic = project["tool"]["setuptools"]["dynamic"]
    files = [*dynamic["dependencies"]["file"]]
    files += [name for extra in dynamic["optional-dependencies"].values() for name in extra["file"]]
    files += [project["project"]["readme"], *project["project"]["license-files"]]
    folders = {package.partition(".")[0] for package in project["tool"]["setuptools"]["packages"]}
    folders |= set(project["tool"]["setuptools"]["package-dir"].values())
    for name in (*files, *folders):
        assert any(fnmatch.fnmatch(name, pattern) for pattern in copied()), name
    (extra,) = re.findall(r"^ARG EXTRA=(\w+)$", DOCKERFILE, re.MULTILINE)
    named = re.search(r"EXTRA is ([\w, ]+):", DOCKERFILE)[1]
    assert {extra, *re.findall(r"\w+\d\d|tpu", named)} <= dynamic["optional-dependencies"].keys()


@pytest.mark.parametrize(
    "path",
    [
        "my.env",
        ".env",
        ".git/config",
        ".venv/test-3.11/bin/python",
        "runs/a/metrics.jsonl",
        "slurm-1.out",
        "tests/a.py",
    ],
)
def test_nothing_else_goes_along(path):
    assert not goes_along(path)


def test_python_gets_the_signals():
    assert 'ENTRYPOINT ["python", "-m", "jax_rlhf"]' in DOCKERFILE  # a list: no shell
