"""What people see of a run on its way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lab.files import Row


class Shown:
    """A bar that takes the progress of a run; a table on a screen, nothing elsewhere."""

    def __init__(self, progress: Progress, name: str, tell: Callable[[Row], str]) -> None:
        self.progress, self.tell = progress, tell
        self.task = progress.add_task(name, row="", total=None)
        self.started = time.perf_counter()

    def __call__(self, step: int, total: int, row: Row | None = None) -> None:
        more = {} if row is None else {"row": self.tell(row)}
        self.progress.update(self.task, completed=step, total=total, **more)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started


@contextmanager
def bar(console: Console, name: str, tell: Callable[[Row], str] = lambda row: "") -> Iterator[Shown]:
    """A progress bar with the newest row as ``tell`` puts it."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(
        TextColumn("{task.description}"),
        *columns,
        TextColumn("{task.fields[row]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        yield Shown(progress, name, tell)
