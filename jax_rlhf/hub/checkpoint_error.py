"""The one error of this package."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written as asked; the message names file and tensor, and what to do."""
