"""The folder of a study, and the tables that people read."""

from __future__ import annotations

import math
import re
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.text import Text
from rich import box
from rich.console import Console
from rich.table import Table

from lab.classifiers import Trained
from lab.figures import write_figure
from lab.files import Row, write_atomically, write_csv, write_json
from lab.options import Options
from lab.pages import rendered

LONGEST = 32  # characters of a word in a figure


class Section(NamedTuple):
    """A table: rows with means and deviations, and ``labels``, headings of what tells the rows apart."""

    title: str
    labels: Mapping[str, str]
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]


class Results:
    """What a study writes into its folder, told in one line at the end."""

    def __init__(self, folder: Path, console: Console) -> None:
        self.folder, self.console = folder, console
        self.started = time.perf_counter()
        self.names: list[str] = []
        self.sections: list[Section] = []
        self.pictures: list[Path] = []

    def csv(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        self._note(write_csv(self.folder / f"{name}.csv", rows))

    def json(self, name: str, content: Any) -> None:
        self._note(write_json(self.folder / f"{name}.json", content))

    def run(self, run: Trained, settings: Mapping[str, Any]) -> None:
        """Every epoch of a training as CSV, and as JSON with the settings that gave it."""
        self.csv(run.name, run.history)
        own = {"head": run.head, "seed": run.seed, "settings": settings, "epochs_to_fit": run.epochs_to_fit}
        self.json(run.name, own | {"history": run.history})

    def text(self, name: str, content: str) -> None:
        self._note(write_atomically(self.folder / name, content.encode()))

    def figures(self, makers: Mapping[str, Callable[[], Figure]]) -> list[Path]:
        """Make and write the figures of these names."""
        with (
            warnings.catch_warnings()
        ):  # a name in a script that the font lacks is a row of boxes, and no more
            warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
            paths = [
                write_figure(self.folder / f"{name}.png", partial(_legible, make))
                for name, make in makers.items()
            ]
        for path in paths:
            self._note(path)
        self.pictures += paths
        return paths

    def table(self, section: Section, plus_minus: str = " ± ") -> None:
        """Print a table, and keep it for the report."""
        self.sections.append(section)
        self.console.print(summary_table(*section, plus_minus))

    def report(self, title: str, settings: Options) -> None:
        """Write all tables and figures so far, and the settings, into one HTML file."""
        shown = {field.name: getattr(settings, field.name) for field in fields(settings)}
        page = rendered("study.html", self.pictures, title=title, sections=self.sections, settings=shown)
        self.text("report.html", page)

    def say(self, text: str) -> None:
        """Print a line as it is."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def tell(self, more: str = "") -> None:
        """Say how long it took and what was written."""
        seconds, names = time.perf_counter() - self.started, ", ".join(self.names)
        self.say(f"{seconds:.0f} s. Written to {self.folder}: {names}{more}")

    def _note(self, path: Path) -> None:
        self.names.append(path.name)


def _legible(make: Callable[[], Figure]) -> Figure:
    """A figure that shows names as they are: ``$`` begins no formula there, and long ones are cut."""
    figure = make()
    for text in figure.findobj(Text):
        if "$" in text.get_text():
            text.set_parse_math(False)
        text.set_text(re.sub(rf"(\S{{{LONGEST}}})\S+", r"\1…", text.get_text()))
    return figure


def grouped(rows: Iterable[Mapping[str, Any]], *names: str) -> dict[tuple[Any, ...], list[Mapping[str, Any]]]:
    """The rows by their values of these names, in the order in which these come."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def mean_and_deviation(rows: Sequence[Mapping[str, Any]], measures: Iterable[str]) -> Row:
    """``NAME`` and ``NAME_std`` of each measure over the rows; one row has no deviation.

    A measure that some row does not have has no mean: one over those that have it would flatter.
    """
    found: Row = {}
    for name in measures:
        values = [row.get(name, math.nan) for row in rows]
        known = len(values) > 1 and not any(map(math.isnan, values))
        found |= {name: fmean(values), f"{name}_std": stdev(values) if known else None}
    return found


@dataclass(frozen=True)
class Column:
    """A measure in a table for reading, with its mean and deviation; digits as in a format."""

    heading: str
    measure: str
    digits: str = ".3f"
    percent: bool = False
    deviation_digits: str | None = None

    def text(self, row: Mapping[str, Any], plus_minus: str = " ± ") -> str:
        """A dash where there is no mean."""
        mean, deviation = row.get(self.measure), row.get(f"{self.measure}_std")
        if mean is None or math.isnan(mean):
            return "–"
        factor = 100 if self.percent else 1
        text = f"{factor * mean:{self.digits}}"
        if deviation is None:
            return text
        return f"{text}{plus_minus}{factor * deviation:{self.deviation_digits or self.digits}}"


def percent(mean: float, deviation: float | None = None) -> str:
    """Mean and, if there is one, deviation, in per cent."""
    return Column("", "x", ".1f", percent=True).text({"x": mean, "x_std": deviation})


def make_table(title: str, labels: Sequence[str], headings: Iterable[str]) -> Table:
    """An empty table: labels stand left, numbers right."""
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for heading in labels:
        table.add_column(heading, justify="left", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def summary_table(
    title: str,
    labels: Mapping[str, str],
    columns: Sequence[Column],
    rows: Iterable[Mapping[str, Any]],
    plus_minus: str = " ± ",
) -> Table:
    """A table of rows that have means and deviations; ``labels`` are headings of what tells rows apart."""
    table = make_table(title, list(labels), (column.heading for column in columns))
    for row in rows:
        names = (str(row[name]) for name in labels.values())
        table.add_row(*names, *(column.text(row, plus_minus) for column in columns))
    return table
