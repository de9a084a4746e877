"""Choices of how a decoder runs. This module imports no library, so that settings can name them."""

from typing import Literal

RematPolicy = Literal["none", "full", "dots"]
AttentionForm = Literal["xla", "flash"]
