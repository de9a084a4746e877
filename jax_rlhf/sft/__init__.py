"""Supervised fine-tuning: its loss and its phase."""
