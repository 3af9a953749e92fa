"""The two ways in which a call can go wrong through no fault of this library."""


class UsageError(ValueError):
    """Wrong use: the message says what was given, and what would be right. Commands exit with status 2."""


class WorkError(RuntimeError):
    """Work that failed although it was asked for rightly. Commands exit with status 1."""
