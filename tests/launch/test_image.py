"""Checks of launch/Dockerfile and .dockerignore that do not need Docker."""

import json
import re
import subprocess
import tomllib

import pytest

from tests.processes import ROOT

LINES = (ROOT / "launch" / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PYPROJECT["tool"]["setuptools"]["dynamic"]["optional-dependencies"]


def after(instruction):
    return [line.removeprefix(instruction).strip() for line in LINES if line.startswith(f"{instruction} ")]


def copied():
    return [source for line in after("COPY") for source in line.split()[:-1]]


def pattern(line):
    """A line of .dockerignore as a regex: * matches text without /, **/ any folders, a folder all of its contents."""
    parts = re.split(r"(\*\*/|\*)", line.removeprefix("!"))
    return re.compile("".join({"**/": "(?:.*/)?", "*": "[^/]*"}.get(p, re.escape(p)) for p in parts) + "(?:/.*)?")


def left_out(path):
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    matching = [line for line in lines if pattern(line).fullmatch(path)]  # the last match counts
    return bool(matching) and not matching[-1].startswith("!")


def test_copied_files_exist_and_are_in_the_build_context():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not in a git checkout")
    files = tracked.stdout.splitlines()
    for source in copied():
        found = [file for file in files if file == source or file.startswith(f"{source}/")]
        assert found, source
        assert not [file for file in found if left_out(file)]
    # Other files in the build context would cost time, or could be secrets.
    whole = [file for file in files if not left_out(file)]
    others = {file.split("/")[0] for file in whole} - set(copied())
    assert others <= {"requirements-dev.txt", "requirements-judge.txt", "requirements-quickstart.txt"}


@pytest.mark.parametrize(
    "path",
    [
        "my.env",
        ".env",
        "configs/my.env",
        "jax_rlhf/data/.env",
        ".git/config",
        ".venv/cuda13-3.12/bin/python",
        "runs/a/config.json",
        "tokens.txt",
        "jax_rlhf/__pycache__/engine.pyc",
        "slurm-jax_rlhf-1.out",
    ],
)
def test_other_files_are_not_in_the_build_context(path):
    assert left_out(path)


def test_the_image_has_the_files_that_pyproject_names():
    project = PYPROJECT["project"]
    dependencies = PYPROJECT["tool"]["setuptools"]["dynamic"]["dependencies"]["file"]
    wanted = ["pyproject.toml", project["readme"], *project["license-files"], *dependencies]
    folders = PYPROJECT["tool"]["setuptools"]["package-dir"]
    wanted += [folders.get(package, package.split(".")[0]) for package in PYPROJECT["tool"]["setuptools"]["packages"]]
    assert set(wanted) <= set(copied())
    (base,) = after("FROM")
    version = re.fullmatch(r"python:3\.(\d+)-slim", base)
    assert project["requires-python"] == ">=3.11"
    assert int(version[1]) >= 11


def test_the_image_can_be_built_for_each_accelerator():
    assert after("ARG") == ["ACCELERATOR", 'PACKAGES=""']
    (install,) = [line for line in after("RUN") if "$ACCELERATOR.txt" in line]
    assert '-r requirements.txt -r "requirements-$ACCELERATOR.txt"' in install
    for accelerator in ("tpu", "cuda12", "cuda13"):
        assert EXTRAS[accelerator]["file"] == [f"requirements-{accelerator}.txt"]
        assert f"requirements-{accelerator}.txt" in copied()
        (line,) = (ROOT / f"requirements-{accelerator}.txt").read_text().splitlines()[-1:]
        assert line.startswith(f"jax[{accelerator}]")
    assert EXTRAS["cuda"] == EXTRAS["cuda12"]


def test_python_receives_the_signals():
    (entry,) = after("ENTRYPOINT")
    assert json.loads(entry) == ["python", "-m", "jax_rlhf"]  # a list starts Python without a shell


def test_all_requirements_name_the_same_jax_version():
    texts = [
        (ROOT / name).read_text()
        for name in ("requirements.txt", *(f"requirements-{a}.txt" for a in EXTRAS if a in ("tpu", "cuda12", "cuda13")))
    ]
    assert (
        len({found for text in texts for found in re.findall(r"^jax(?:\[\w+\])?(>=\S+)", text, flags=re.MULTILINE)})
        == 1
    )
