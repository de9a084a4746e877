"""Optimizers, microbatches, and the supervised step."""
