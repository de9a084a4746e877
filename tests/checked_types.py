"""Checks annotations while tests run: the shapes and dtypes of arguments and results."""

from collections.abc import Callable
from typing import Any, get_args

from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray, PyTree, install_import_hook

CHECKED = [f"jax_rlhf.{package}" for package in ("models", "optim", "ppo", "rl", "sampling")]

_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int counts as a float, as in pyright


def check(function: Callable) -> Callable:
    """Wraps a function so that its array annotations are checked. pyright checks the other types.

    `__init__` is not checked, because JAX rebuilds dataclasses with shardings, shapes or None instead of arrays.
    """
    arrays = {name: hint for name, hint in function.__annotations__.items() if _has_arrays(hint)}
    if not arrays or function.__name__ == "__init__":
        return function
    function.__annotations__ = arrays
    return _checked(function)


def _has_arrays(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, AbstractArray | PyTree):
        return True
    return any(_has_arrays(part) for part in get_args(hint))


def install() -> None:
    """Switches the checks on for the packages in `CHECKED`. Call it before they are imported."""
    install_import_hook(CHECKED, f"{__name__}.{check.__name__}")
