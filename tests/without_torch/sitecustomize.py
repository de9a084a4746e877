"""Processes that tests start have no torch, as those of most users: importing it is a quarter of their start."""

import sys

sys.modules["torch"] = None
