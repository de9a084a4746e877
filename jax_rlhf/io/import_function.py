"""Imports a function by its name. This module imports the standard library alone: reward workers load it by itself."""

import functools
import importlib
import importlib.machinery
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

FORMS = '"package.module:function" or "FILE.py:function"'
_NAME = re.compile(r"(?:[A-Za-z_][\w.]*|.+\.py):[A-Za-z_][\w.]*", re.DOTALL)


class NotAFunctionError(TypeError):
    """What a name stands for is not a function."""


def is_function_name(text: str) -> bool:
    """Whether a text has the form "package.module:function" or "FILE.py:function"."""
    return _NAME.fullmatch(text) is not None


def import_function(name: str) -> Callable:
    """Imports a function.

    A file is run like a script: its folder is added to the end of sys.path, so that it can import its neighbours. It is
    run once, however often it is named.

    Args:
      name: "package.module:function" or "FILE.py:function".

    Raises:
      ImportError, AttributeError: there is no such module, file or function.
      NotAFunctionError: it is something else.
    """
    module, _, attribute = name.rpartition(":")
    function: Any = _file_module(module) if module.endswith(".py") else importlib.import_module(module)
    function = functools.reduce(getattr, attribute.split("."), function)
    if not callable(function):
        raise NotAFunctionError(f"it is a {type(function).__name__}, not a function")
    return function


def _file_module(path: str) -> ModuleType:
    file = Path(path).expanduser().resolve()
    name = str(file)  # also the module's name, so that "<module>:<function>" can be imported by another process
    if name in sys.modules:
        return sys.modules[name]
    if not file.is_file():
        raise ImportError(f"there is no file {path}")
    loader = importlib.machinery.SourceFileLoader(name, name)
    module = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(name, loader, origin=name))
    module.__file__ = name
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    sys.modules[name] = module
    try:
        loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
