"""The base of every error that a user can mend: its message says what is wrong, where, and what to do."""


class UserError(Exception):
    """Shown by the commands as a message, without a traceback."""


class TrackingError(UserError):
    """The tracking store cannot be reached or used."""


class DataError(UserError):
    """The data cannot be used."""
