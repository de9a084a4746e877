"""Folders that are made once for all tests, also if several processes of pytest run them (pytest -n 2)."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import filelock
import pytest


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that the first call fills while other processes wait. No test may change its contents.

    Args:
      factory: pytest's fixture `tmp_path_factory`.
      name: the folder's name.
      make: fills the folder. If it raises, the next call tries again.

    Returns:
      The folder.
    """
    # With xdist, only this run uses the parent folder. Without xdist, earlier runs use the parent folder too.
    root = factory.getbasetemp() if "PYTEST_XDIST_WORKER" not in os.environ else factory.getbasetemp().parent
    folder, made = root / name, root / f"{name}.made"
    with filelock.FileLock(root / f"{name}.lock"):
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            made.touch()
    return folder
