"""What is made once for all tests, also where several processes of pytest share them out (pytest -n 2)."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import filelock
import pytest


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that the first who asks fills; the others wait meanwhile. No test may change what is in it.

    Args:
      factory: pytest's fixture `tmp_path_factory`.
      name: of the folder.
      make: fills it. Where it raises, the next who asks tries again.

    Returns:
      The folder.
    """
    # The folder above the own one is of all processes of this run; of a single one it is that of former runs too.
    root = factory.getbasetemp() if "PYTEST_XDIST_WORKER" not in os.environ else factory.getbasetemp().parent
    folder, made = root / name, root / f"{name}.made"
    with filelock.FileLock(root / f"{name}.lock"):
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            made.touch()
    return folder
