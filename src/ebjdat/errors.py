"""Errors that a user can fix, and safe display of untrusted text on a terminal.

An error message says what is wrong, where, and what to do. Names, notes and other programs' output may come from untrusted files.
"""

from __future__ import annotations

from collections.abc import Iterable

LINE, LINES = 1000, 200  # limits of a message: characters per line, and lines


class UserError(Exception):
    """Commands show it as a message without a traceback."""


class AttackError(UserError):
    """An attack cannot be run on this network."""


class TrackingError(UserError):
    """The tracking store cannot be reached or used."""


class DataError(UserError):
    """The data cannot be used."""


def printable(text: object, keep: str = "") -> str:
    r"""Text with everything that a terminal could interpret escaped, as in "\x1b[2J".

    That is control characters, line breaks, marks that change the direction of writing, and bytes that were not UTF-8. keep:
    characters to leave as they are.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode("ascii") for c in text)


def brief(text: object, length: int = LINE) -> str:
    """One printable line: at most `length` characters, and how many more there are."""
    text = str(text)
    left = len(text) - length
    return printable(text[:length]) + (f"… ({left:,} more characters)" if left > 0 else "")


def few(names: Iterable[object], most: int = 4) -> str:
    """The first names, each in one printable line, and how many more there are: "a, b and 3 more"."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(brief(name, 100) for name in names[:most]) + more


def message(text: object) -> str:
    """A message for display: line breaks are kept, everything else is printable, and its length is limited."""
    lines = str(text).split("\n")
    left = len(lines) - LINES
    return "\n".join([brief(line) for line in lines[:LINES]] + ([f"… ({left:,} more lines)"] if left > 0 else []))


def in_a_line(error: BaseException, length: int = 300) -> str:
    """Another program's error in one line: type and text, or only the type if its text is unavailable."""
    try:
        text = str(error)
    except Exception:
        text = ""
    return f"{type(error).__name__}: {brief(' '.join(text.split()), length)}".removesuffix(": ")
