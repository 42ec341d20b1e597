"""Progress of long work: a live bar on a terminal, one plain line per finished part in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

REFRESH_SECONDS = 0.5  # on a terminal
LOG_SECONDS = 30.0  # in a log file


class Bar:
    """`with Bar("attack", total) as bar: bar.advance(); bar.show({...}); bar.line("...")`."""

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        self.title = title
        self.live = sys.stderr.isatty()
        self._shown = time.monotonic()
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("after"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[values]}", markup=False),
            console=Console(stderr=True),
            disable=not self.live,
        )
        self._task = self._progress.add_task(title, total=total, completed=done, values="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def advance(self, n: int = 1) -> None:
        self._progress.advance(self._task, n)
        if not self.live and time.monotonic() - self._shown > LOG_SECONDS:
            self._shown = time.monotonic()
            task = self._progress.tasks[0]
            self.line(f"{task.completed:.0f} of {task.total:.0f}, {task.completed / (task.total or 1):.0%}")

    def at(self, done: int) -> None:
        """Set how much is done, when work goes back."""
        self._progress.update(self._task, completed=done)

    def due(self) -> bool:
        """Whether values would be seen if shown now; reading them from a GPU costs a wait, so ask first."""
        now = time.monotonic()
        if not self.live or now - self._shown < REFRESH_SECONDS:
            return False
        self._shown = now
        return True

    def show(self, values: Mapping[str, float]) -> None:
        self._progress.update(self._task, values=format_values(values))

    def line(self, text: str) -> None:
        if self.live:
            self._progress.console.print(f"{self.title}: {text}", highlight=False, markup=False)
        else:
            print(f"{self.title}: {text}", file=sys.stderr, flush=True)


def format_values(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.1%}" if "acc" in name else f"{name} {value:.3g}" for name, value in values.items())
