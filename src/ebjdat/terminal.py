"""What every command shares: its common options, errors as one line, tables that show text as it is."""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ebjdat.checkout import refuse_another
from ebjdat.errors import UserError, message, printable
from ebjdat.settings import ParamsError, nearest

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

ParamsFile = Annotated[Path, typer.Option("--params", help="Profile, e.g. params/digits.yaml.")]
Overrides = Annotated[list[str], typer.Option("--override", help="A YAML file laid over the profile, or key.path=value; repeatable.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; default: the profile's runtime.threads.", min=1)]
NO_OVERRIDES: list[str] = []


def _here() -> Path:
    try:
        return Path.cwd()
    except FileNotFoundError:
        raise UserError("the folder that this runs in was deleted: change to another") from None


def friendly(command: Callable[..., None]) -> Callable[..., None]:
    """Expected errors end with their message and exit code 1; Ctrl-C says that what was done is kept.

    Expected are also another checkout's code, and what the operating system says of a file, as "File name too long".
    """

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            refuse_another(_here())
            command(*args, **kwargs)
        except UserError as error:
            typer.secho(message(f"error: {error}"), fg="red", err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            typer.secho(
                "stopped; nothing is half-written, and training continues where it was when the same command runs again",
                fg="yellow",
                err=True,
            )
            raise typer.Exit(130) from None
        except OSError as error:
            if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG):
                raise
            typer.secho(message(f"error: {error}; nothing was left half-written, fix this and rerun"), fg="red", err=True)
            raise typer.Exit(1) from None

    return run


def plain(*lines: object) -> Text:
    """A cell of a table, as it is: without this rich reads "[red]" and ":x:" as markup, and a terminal what is not printable."""
    from rich.text import Text

    return Text("\n".join(map(printable, lines)))


def console(width: int) -> Console:
    """What prints tables; width: in characters, where it is no terminal, which has its own."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=width)


def known(name: str, names: dict[str, Any]) -> str:
    if name not in names:
        raise ParamsError(f"{name!r} is not in this profile; {nearest(name, list(names))}")
    return name
