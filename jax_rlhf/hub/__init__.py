"""Loads and saves checkpoints: Hugging Face folders, hub ids and GGUF files.

The names of __init__.pyi are imported when they are first used, so that settings load no library.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
