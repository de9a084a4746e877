"""The reward model: its loss and its phase."""
