"""Annotations that are checked while tests run: shapes and dtypes of what functions take and return."""

from collections.abc import Callable
from typing import Any, get_args

from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray, PyTree, install_import_hook

CHECKED = [f"jax_rlhf.{package}" for package in ("models", "optim", "ppo", "rl", "sampling")]

_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as for pyright


def check(function: Callable) -> Callable:
    """The function with its arrays checked; of all else pyright knows the types.

    `__init__` is left alone: JAX makes the dataclasses anew with shardings, shapes or None where arrays were.
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
    """Has the packages' functions checked. Call it before they are imported."""
    install_import_hook(CHECKED, f"{__name__}.{check.__name__}")
