"""Text from files on a terminal: printable, in one line, of limited length."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import typer

from ebjdat.errors import UserError, brief, few, message, printable
from ebjdat.terminal import friendly


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("pgd_at 91 % ± 2", "pgd_at 91 % ± 2"),
        ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
        ("a\tb\nc\rd", "a\\tb\\nc\\rd"),
        ("\u202ereversed", "\\u202ereversed"),
        ("caf\udce9", "caf\\udce9"),  # a file name that is not UTF-8
        ("\x9b2J", "\\x9b2J"),
    ],
)
def test_what_a_terminal_would_interpret_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown
    shown.encode()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], ""),
        ("ab", "a, b"),
        ("abcd", "a, b, c, d"),
        ("abcde", "a, b, c, d and 1 more"),
        (["\n", "x" * 101], f"\\n, {'x' * 100}… (1 more characters)"),
    ],
)
def test_of_many_names_the_first_are_shown(names: Sequence[str], expected: str) -> None:
    assert few(iter(names)) == expected


def test_messages_keep_their_lines_and_are_limited() -> None:
    assert message("one\n  two\x1b[1m") == "one\n  two\\x1b[1m"
    assert brief("a" * 1500) == "a" * 1000 + "… (500 more characters)"
    long = message("\n".join(["x" * 5000] * 300))
    assert len(long) < 210_000
    assert long.endswith("… (100 more lines)")


def test_a_command_shows_an_errors_text_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    @friendly
    def command() -> None:
        raise UserError("folder/\x1b[31mred[/]\udce9: unknown\nand more")

    with pytest.raises(typer.Exit):
        command()
    assert capsys.readouterr().err == "error: folder/\\x1b[31mred[/]\\udce9: unknown\nand more\n"
