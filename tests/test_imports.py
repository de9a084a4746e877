"""What an import loads: nothing that was not asked for."""

import importlib
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


def test_the_package_alone_loads_no_library():
    assert not loaded_by("import jax_rlhf") & (HEAVY | {"jax", "flax", "chex"})


def test_the_mathematics_loads_jax_chex_flax_and_jaxtyping():
    before = loaded_by("import jax, chex, flax, flax.struct")
    assert not (loaded_by("import jax_rlhf.rl") - before - {"jax_rlhf"}) & HEAVY
    assert loaded_by("import jax_rlhf.rl") - before <= {"jax_rlhf", "jaxtyping", "wadler_lindig"}


def test_public_names_come_from_their_modules_when_they_are_used():
    for name in jax_rlhf.__all__:
        assert getattr(jax_rlhf, name) is not None
    for name, module in jax_rlhf._MODULES.items():
        assert getattr(jax_rlhf, name) is getattr(importlib.import_module(f"jax_rlhf.{module}"), name)
    assert set(jax_rlhf._MODULES) | {"__version__"} == set(jax_rlhf.__all__) <= set(dir(jax_rlhf))
    with pytest.raises(AttributeError, match="has no attribute 'PPOTrainr'"):
        jax_rlhf.PPOTrainr  # noqa: B018
