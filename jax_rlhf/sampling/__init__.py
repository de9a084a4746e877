"""Samples responses, and computes log-probs of given tokens.

The names in __init__.pyi are imported lazily, so that settings can be read without importing large libraries.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
