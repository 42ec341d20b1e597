"""The base of every error that a user can mend, and how text from files is shown on a terminal.

An error's message says what is wrong, where, and what to do. Names, notes and what other programs say come from files, which
may be anybody's.
"""

from __future__ import annotations

from collections.abc import Iterable

LINE, LINES = 1000, 200  # characters of a line, and lines, that a message may have


class UserError(Exception):
    """Shown by the commands as a message, without a traceback."""


class AttackError(UserError):
    """An attack cannot be run on this network."""


class TrackingError(UserError):
    """The tracking store cannot be reached or used."""


class DataError(UserError):
    """The data cannot be used."""


def printable(text: object, keep: str = "") -> str:
    r"""Text in which everything that a terminal would take as a command stands as an escape, as in "\x1b[2J".

    Those are control characters, line breaks, marks that turn the direction of writing, and bytes that were no UTF-8. keep:
    those among them that are meant.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode("ascii") for c in text)


def brief(text: object, length: int = LINE) -> str:
    """One printable line; of a longer text its first characters, and how many more there are."""
    text = str(text)
    left = len(text) - length
    return printable(text[:length]) + (f"… ({left:,} more characters)" if left > 0 else "")


def few(names: Iterable[object], most: int = 4) -> str:
    """The first of them, each in one printable line, and how many more there are: "a, b and 3 more"."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(brief(name, 100) for name in names[:most]) + more


def message(text: object) -> str:
    """A message as it is shown: with its own line breaks, everything else printable, and never pages of it."""
    lines = str(text).split("\n")
    left = len(lines) - LINES
    return "\n".join([brief(line) for line in lines[:LINES]] + ([f"… ({left:,} more lines)"] if left > 0 else []))


def in_a_line(error: BaseException, length: int = 300) -> str:
    """Another program's error by its type and text, in one line; by its type alone where its text cannot be had."""
    try:
        text = str(error)
    except Exception:
        text = ""
    return f"{type(error).__name__}: {brief(' '.join(text.split()), length)}".removesuffix(": ")
