"""Config files: the packaged ones, and loading."""

import importlib.machinery
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from jax_rlhf.settings import new_name

_NEW_IMPORTS = {
    "jax_rlhf.phases": "from jax_rlhf.config import default_config",
    "jax_rlhf.packaged": "from jax_rlhf.cli.packaged import packaged_config",
}
"""Modules that config files of earlier versions import → the import now."""


def packaged_configs() -> dict[str, Path]:
    """The configs that come with the package: name → file."""
    inside, beside = Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs"
    folder = inside if inside.is_dir() else beside  # installed, or in a checkout
    return {file.stem: file for file in sorted(folder.glob("*.py")) if file.stem != "__init__"}


def packaged_config(name: str) -> ConfigDict:
    """The settings of a packaged config, such as "ppo", for another config to change."""
    return get_config_of(packaged_configs()[name])()


def get_config_of(file: Path) -> Callable[..., ConfigDict]:
    """Runs a config file, and returns its function get_config.

    Raises:
      ValueError: the file raises an error (the message has the line), or has no get_config.
    """
    loader = importlib.machinery.SourceFileLoader(f"config_file_{file.stem}", str(file))
    module = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(loader.name, loader, origin=str(file)))
    module.__file__ = str(file)
    sys.modules[loader.name] = module  # dataclasses in the file look up their module there
    try:
        loader.exec_module(module)
    except Exception as error:  # the file is the user's code
        raise ValueError(error_text(file, error)) from error
    if not callable(getattr(module, "get_config", None)):
        raise ValueError(
            f"{file} has no function get_config; a config is a Python file whose get_config returns the settings: see "
            "configs/ppo.py."
        )
    return module.get_config


def error_text(file: Path, error: BaseException) -> str:
    """A message for an error that a config file raised, with the file and the line."""
    if isinstance(error, SyntaxError):
        return f"{file}, line {error.lineno}: {error.msg}"
    hint = _new_name_in(error)
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    where = f"{file}, line {own[-1].lineno}" if own else str(file)
    return f"{where}: {type(error).__name__}: {error}" + (f" ({hint})" if hint else "")


def _new_name_in(error: BaseException) -> str:
    """A hint for an error that a config file of an earlier version causes; empty for other errors."""
    if isinstance(error, ModuleNotFoundError):
        return _NEW_IMPORTS.get(error.name or "", "")
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    if "ml_collections" not in raised_in:  # not by a config, but by the file's own code
        return ""
    key = re.search(r"[\"'](\w+)[\"']", str(error))
    if not isinstance(error, AttributeError | KeyError) or key is None:
        return ""
    names = (new_name(f"{section}.{key[1]}") for section in ("ppo", "reward"))
    now = "reward" if key[1] == "reward_training" else next(filter(None, names), None)
    return f"it is now config.{now}" if now else ""
