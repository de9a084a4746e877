"""Types of execution options. This module imports no library, so that settings can use them cheaply."""

from typing import Literal

RematPolicy = Literal["none", "full", "dots"]
AttentionForm = Literal["xla", "flash"]
