"""Progress on standard error, and only on a terminal."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from batchnorm.studies.settings import CellBase

__all__ = ["Bar", "TerminalListener"]


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        text = f"{task.speed:.0f} {self._unit}/s" if task.speed else ""
        return Text(text, style="progress.data.speed")


def _progress(unit: str, *, quiet: bool) -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(unit),
        TimeRemainingColumn(),
        console=console,
        disable=quiet or not console.is_terminal,
        transient=True,
    )


class Bar:
    """Shows how many of a number of things are done, how fast, and the time left."""

    def __init__(self, text: str, unit: str, *, quiet: bool) -> None:
        self._progress = _progress(unit, quiet=quiet)
        self._task = self._progress.add_task(text, total=None)

    def __call__(self, done: int, total: int | None) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=done, total=total)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()


class TerminalListener:
    """Shows which cell is being trained, how fast, and the time left."""

    def __init__(self, *, quiet: bool) -> None:
        self._progress = _progress("steps", quiet=quiet)
        self._task: TaskID | None = None
        self._cells = self._cell = 0

    def start(self, cells: int, steps: int) -> None:
        """Show the bar."""
        self._cells = cells
        self._task = self._progress.add_task("", total=steps)

    def cell(self, settings: CellBase) -> None:
        """Name the cell."""
        self._cell += 1
        if self._task is not None:
            axes = (
                f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
                for name, value in list(settings.axes().items())[:3]
            )
            text = f"{self._cell}/{self._cells}  {', '.join(axes)}"
            self._progress.update(self._task, description=text)

    def advance(self, steps: int) -> None:
        """Move the bar."""
        if self._task is not None:
            self._progress.advance(self._task, steps)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()
