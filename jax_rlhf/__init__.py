"""RLHF on a mesh, in JAX: supervised fine-tuning, reward model, PPO.

The public names stand in __init__.pyi. Each is imported when it is first used.
"""

import os
from importlib import metadata

import lazy_loader

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # PyTorch is missing on purpose: it is not used

try:
    __version__ = metadata.version("jax_rlhf")
except metadata.PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0.1.0"

__getattr__, __dir__, _names = lazy_loader.attach_stub(__name__, __file__)
__all__ = ["__version__", *_names]
