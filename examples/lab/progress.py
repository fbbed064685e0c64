"""What people see of a run on its way, and what they should read when it is over."""

from __future__ import annotations

import sys
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

PARTS = 10  # lines that a run prints where there is no screen
PAUSE = 2.0  # seconds between them, at least

_notes: list[str] = []


def note(text: str) -> None:
    """Have something printed when all is done."""
    _notes.append(text)


def print_notes() -> None:
    """Print what was noted, once."""
    while _notes:
        print(_notes.pop(0), file=sys.stderr)


def make_console() -> Console:
    """A console that prints names as they are: a folder may be called ``[red]`` or ``:smile:``."""
    return Console(markup=False, emoji=False)


class Shown:
    """A bar that takes the progress of a run; where there is no screen a line now and then."""

    def __init__(self, progress: Progress, name: str, tell: Callable[[Row], str]) -> None:
        self.progress, self.name, self.tell = progress, name, tell
        self.task = progress.add_task(name, row="", total=None)
        self.started = self.spoken = time.perf_counter()
        self.first: int | None = None  # the steps that a continued run had taken before
        self.part, self.row = 0, ""

    def __call__(self, step: int, total: int, row: Row | None = None) -> None:
        self.row = self.row if row is None else self.tell(row)
        self.first = step if self.first is None else self.first
        self.progress.update(self.task, completed=step, total=total, row=self.row)
        part = PARTS * step // max(total, 1)
        if self.progress.disable and part > self.part and time.perf_counter() - self.spoken >= PAUSE:
            self.part, self.spoken = part, time.perf_counter()
            line = f"{self.name}: {step} of {total}, {self.seconds:.0f} s"
            if self.first < step < total:
                line += f", {self.seconds * (total - step) / (step - self.first):.0f} s left"
            self.progress.console.print(
                f"{line}, {self.row}" if self.row else line, highlight=False, soft_wrap=True
            )

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started


@contextmanager
def bar(console: Console, name: str, tell: Callable[[Row], str] = lambda row: "") -> Iterator[Shown]:
    """A progress bar with the newest row as ``tell`` puts it."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(
        TextColumn("{task.description}", markup=False),
        *columns,
        TextColumn("{task.fields[row]}", markup=False),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        yield Shown(progress, name, tell)
