"""Every import in the package is one that the table of docs/architecture.md allows."""

import ast
import collections
import graphlib
import re
from pathlib import Path

import pytest

from tests.processes import ROOT

PACKAGE = "jax_rlhf"
SHARED_NAMES = {"__init__.py", "__main__.py", "config.py", "loss.py", "train.py"}


def table(page: str) -> dict[str, set[str]]:
    """Package → packages that it may import, in the order of the page's table."""
    rows = re.findall(r"^\| `(\w+)(?:/|\.py)` \|.*\|([^|]*)\|$", page, flags=re.MULTILINE)
    return {name: set(re.findall(r"`(\w+)`", allowed)) for name, allowed in rows}


ALLOWED = table((ROOT / "docs" / "architecture.md").read_text())


def modules() -> dict[str, Path]:
    """Path within the package → file; configs/ is a package of it once installed."""
    files = {str(file.relative_to(ROOT / PACKAGE)): file for file in (ROOT / PACKAGE).rglob("*.py")}
    return files | {f"configs/{file.name}": file for file in (ROOT / "configs").glob("*.py")}


MODULES = modules()


def package_of(module: str) -> str:
    """The row of the table for a module."""
    return module.removesuffix(".py").partition("/")[0]


PACKAGES = {package_of(module) for module in MODULES}


def imported_packages(source: str, module: str) -> set[str]:
    """The rows of the table that a module imports, at any place in it; "__init__" = the package's own names."""
    parents = [PACKAGE, *module.split("/")[:-1]]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{name}.{alias.name}" for alias in node.names}
    inside = [name.split(".")[1] if "." in name else "__init__" for name in found if name.split(".")[0] == PACKAGE]
    return {name if name in PACKAGES else "__init__" for name in inside} - {package_of(module)}


IMPORTED = {module: imported_packages(file.read_text(), module) for module, file in MODULES.items()}
NOT_ALLOWED = {
    (module, package)
    for module, packages in IMPORTED.items()
    for package in packages - ALLOWED.get(package_of(module), set())
}


def test_the_table_has_a_row_for_every_package_and_no_other():
    assert ALLOWED.keys() == PACKAGES


def test_rows_may_only_import_rows_below():
    names = list(ALLOWED)
    for index, name in enumerate(names):
        assert ALLOWED[name] <= set(names[index + 1 :]), name


def test_every_import_is_one_that_the_table_allows():
    assert sorted(NOT_ALLOWED) == []


def test_the_packages_have_no_circular_imports():
    graph = collections.defaultdict(set)
    for module, packages in IMPORTED.items():
        graph[package_of(module)] |= packages
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the cycle
    assert set(order) >= PACKAGES - {"__main__"}


def test_a_file_name_occurs_once():
    count = collections.Counter(module.rpartition("/")[2] for module in MODULES if not module.startswith("configs/"))
    assert {name for name, times in count.items() if times > 1} <= SHARED_NAMES


@pytest.mark.parametrize(
    ("line", "package"),
    [
        ("import jax_rlhf.cli.run", "cli"),
        ("from jax_rlhf.ppo.step import make_update", "ppo"),
        ("from jax_rlhf import ppo", "ppo"),
        ("from jax_rlhf import PPOTrainer", "__init__"),
        ("import jax_rlhf", "__init__"),
        ("from ..config import RunConfig", "config"),
        ("def f():\n    from jax_rlhf.data import DataConfig", "data"),
        ("if TYPE_CHECKING:\n    import jax_rlhf.hub", "hub"),
    ],
)
def test_an_import_is_found_in_every_form(line, package):
    assert imported_packages(line, "rl/losses.py") == {package}
    assert package not in ALLOWED["rl"]


def test_imports_of_others_and_of_itself_are_not_counted():
    assert imported_packages("import jax\nfrom jax_rlhf.rl import gae\nfrom . import kl", "rl/losses.py") == set()
