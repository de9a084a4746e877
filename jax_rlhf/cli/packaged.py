"""Config files: those that come with the package, and how one is run."""

import importlib.machinery
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from jax_rlhf.settings import new_name


def packaged_configs() -> dict[str, Path]:
    """The configs that come with the package.

    Returns:
      name → file.
    """
    inside, beside = Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs"
    folder = inside if inside.is_dir() else beside  # installed, or in a checkout
    return {file.stem: file for file in sorted(folder.glob("*.py")) if file.stem != "__init__"}


def packaged_config(name: str) -> ConfigDict:
    """One of them, for another to change.

    Args:
      name: such as "ppo".

    Returns:
      Its settings.
    """
    return get_config_of(packaged_configs()[name])()


def get_config_of(file: Path) -> Callable[..., ConfigDict]:
    """Runs a config file.

    Args:
      file: a Python file.

    Returns:
      Its get_config.

    Raises:
      ValueError: it has none, or fails; says in which line.
    """
    loader = importlib.machinery.SourceFileLoader(f"config_file_{file.stem}", str(file))
    module = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(loader.name, loader, origin=str(file)))
    module.__file__ = str(file)
    sys.modules[loader.name] = module  # where a dataclass of the file looks for its module
    try:
        loader.exec_module(module)
    except Exception as error:  # it is the user's code
        raise ValueError(said_of(file, error)) from error
    if not callable(getattr(module, "get_config", None)):
        raise ValueError(
            f"{file} has no function get_config; a config is a Python file with one, which returns the settings: "
            "configs/ppo.py is an example."
        )
    return module.get_config


def said_of(file: Path, error: BaseException) -> str:
    """What to say of an error in a config file.

    Args:
      file: the file.
      error: what it raised.

    Returns:
      A message with the file's line.
    """
    if isinstance(error, SyntaxError):
        return f"{file}, line {error.lineno}: {error.msg}"
    hint = _new_name_in(error)
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    place = f"{file}, line {own[-1].lineno}" if own else str(file)
    return f"{place}: {type(error).__name__}: {error}" + (f" ({hint})" if hint else "")


def _new_name_in(error: BaseException) -> str:
    """What an error in a config file of an earlier version is about; empty where it is no such error."""
    if isinstance(error, ModuleNotFoundError) and error.name == "jax_rlhf.phases":
        return "from jax_rlhf.config import default_config"
    key = re.search(r"[\"'](\w+)[\"']", str(error))
    if not isinstance(error, AttributeError | KeyError) or key is None:
        return ""
    names = (new_name(f"{section}.{key[1]}") for section in ("ppo", "reward"))
    now = "reward" if key[1] == "reward_training" else next(filter(None, names), None)
    return f"it is now config.{now}" if now else ""
