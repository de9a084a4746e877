"""Imports load only the libraries that they need."""

import subprocess
import sys

import pytest

import jax_rlhf
from tests.processes import PYTHONPATH

HEAVY = {
    "transformers",
    "datasets",
    "orbax",
    "optax",
    "grain",
    "pyarrow",
    "tokenizers",
    "ml_collections",
    "huggingface_hub",
}


def loaded_by(statement):
    """The top-level packages that a fresh interpreter has loaded after a statement."""
    code = f"{statement}; import sys; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    environment = {"PYTHONPATH": PYTHONPATH, "PATH": "", "JAX_PLATFORMS": "cpu"}
    made = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return set(made.stdout.split())


def test_importing_the_package_loads_no_large_library():
    assert not loaded_by("import jax_rlhf") & (HEAVY | {"jax", "flax", "chex"})


def test_the_settings_and_the_help_load_no_large_library():
    heavy = (HEAVY | {"jax", "flax", "chex", "numpy"}) - {"ml_collections"}
    assert not loaded_by("import jax_rlhf.config, jax_rlhf.cli.main") & heavy
    assert not loaded_by("from jax_rlhf.cli.main import help_text; help_text()") & heavy


def test_a_run_loads_datasets_only_when_it_reads_them():
    assert "pandas" not in loaded_by("import jax_rlhf.cli.run, jax_rlhf.cli.phases")  # `datasets` imports pandas


def test_the_rl_package_loads_only_jax_chex_flax_and_jaxtyping():
    before = loaded_by("import jax, chex, flax, flax.struct, lazy_loader")
    assert not (loaded_by("import jax_rlhf.rl") - before - {"jax_rlhf"}) & HEAVY
    assert loaded_by("import jax_rlhf.rl") - before <= {"jax_rlhf", "jaxtyping", "wadler_lindig"}


def test_public_names_are_imported_when_they_are_used():
    for name in jax_rlhf.__all__:
        assert getattr(jax_rlhf, name) is not None
    assert set(jax_rlhf.__all__) <= {*dir(jax_rlhf), "__version__"}
    with pytest.raises(AttributeError, match="PPOTrainr"):
        jax_rlhf.PPOTrainr  # noqa: B018
