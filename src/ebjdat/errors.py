"""The base of every error that a user can mend: its message says what is wrong, where, and what to do."""


class UserError(Exception):
    """Shown by the commands as a message, without a traceback."""


class AttackError(UserError):
    """An attack cannot be run on this network."""


class TrackingError(UserError):
    """The tracking store cannot be reached or used."""


LONGEST = 300  # characters of somebody else's message


def in_a_line(error: BaseException) -> str:
    """Another program's error by its type and text, in one line of printable characters."""
    text = " ".join(str(error).split())
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return f"{type(error).__name__}: {text[:LONGEST]}{'…' if len(text) > LONGEST else ''}".removesuffix(": ")
