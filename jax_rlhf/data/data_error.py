"""What goes wrong with data."""


class DataError(ValueError):
    """Data that cannot be used; the message says where, what was found, and how to mend it."""
