"""What the user sees while a run goes on: bars on a terminal, silence elsewhere."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lorax.train.loop import Row


class Display:
    """Progress on standard error.

    Messages (`say`) always appear, one line each: they tell of things that went differently than asked. Bars
    appear only on a terminal and never in `quiet` mode.

    Args:
        quiet: no bars even on a terminal (`--json`).
        console: another place than standard error.
    """

    def __init__(self, *, quiet: bool = False, console: Console | None = None):
        self.console = console or Console(stderr=True, highlight=False)
        self.live = not quiet and self.console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description:<14}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.live,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """One line that the user should not miss."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def begin(self, what: str, total: int, done: int = 0) -> None:
        """A new bar: `what`, of `total` units, of which `done` are behind us."""
        self._task = self._progress.add_task(what, total=total, completed=done, note="")

    def advance(self, units: int = 1) -> None:
        """Move the current bar."""
        if self._task is not None:
            self._progress.advance(self._task, units)

    def stepped(self, row: Row) -> None:
        """Move the current bar by a step and show its loss and speed."""
        if self._task is not None:
            speed = "compiled" if row.compiled else f"{row.tokens / row.seconds:,.0f} tok/s"
            self._progress.update(self._task, advance=1, note=f"loss {row.loss:.3f}  {speed}")


def silent() -> Display:
    """A display that says nothing: another process says it."""
    return Display(quiet=True, console=Console(quiet=True))
