"""The error that is raised for invalid data."""


class DataError(ValueError):
    """Data that cannot be used; the message says where it is, what is wrong, and how to mend it."""
