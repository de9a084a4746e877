"""The error that is raised for invalid checkpoints."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message names the file and tensor, and says what to do."""
