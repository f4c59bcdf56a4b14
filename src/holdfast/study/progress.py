"""What a long run tells its watcher; the study reports, a sink shows (or stays silent)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress


class Sink(Protocol):
    """Receives the progress of a study."""

    def plan(self, total: int) -> None:
        """``total`` computations (trainings, merges, measurements) are left to do."""

    def begin(self, name: str, total: int) -> None:
        """A computation of ``total`` units starts."""

    def advance(self, units: int = 1) -> None:
        """``units`` more of the current computation are done."""

    def end(self) -> None:
        """The current computation is done."""


class Silent:
    """Shows nothing."""

    def plan(self, total: int) -> None: ...

    def begin(self, name: str, total: int) -> None: ...

    def advance(self, units: int = 1) -> None: ...

    def end(self) -> None: ...


class Bars:
    """Two Rich bars: the whole study, and the computation under way with its time left."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.whole = progress.add_task("study", total=None)
        self.current = progress.add_task("", total=None, visible=False)

    def plan(self, total: int) -> None:
        self.progress.update(self.whole, total=total)

    def begin(self, name: str, total: int) -> None:
        self.progress.reset(self.current, total=total or None, description=name, visible=True)

    def advance(self, units: int = 1) -> None:
        self.progress.advance(self.current, units)

    def end(self) -> None:
        self.progress.advance(self.whole)
        self.progress.update(self.current, visible=False)


@contextmanager
def bars() -> Iterator[Sink]:
    """Progress bars on stderr; plain lines where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:
        yield Lines(console)
        return
    columns = (
        TextColumn("{task.description:<44}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield Bars(progress)


class Lines:
    """One line per computation, for logs."""

    def __init__(self, console: object) -> None:
        self.console = console
        self.done, self.total = 0, 0

    def plan(self, total: int) -> None:
        self.total = total

    def begin(self, name: str, total: int) -> None:
        self.console.print(f"[{self.done + 1}/{self.total}] {name}", markup=False, highlight=False)  # type: ignore[attr-defined]

    def advance(self, units: int = 1) -> None: ...

    def end(self) -> None:
        self.done += 1
