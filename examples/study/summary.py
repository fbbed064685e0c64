"""Tables of a study: every number, the last epoch over the seeds, and the few numbers to compare heads by."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from rich.table import Table

from comparison.evaluation import Row
from comparison.reporting import make_table, write_csv, write_json
from comparison.training import Run
from study.measures import existing

ETF_THRESHOLDS = (0.2, 0.1, 0.05)


@dataclass(frozen=True)
class Headline:
    """A column of the tables for reading."""

    measure: str
    heading: str
    digits: str = ".3f"
    percent: bool = False

    def text(self, row: Mapping[str, Any] | None, plus_minus: str = " ± ") -> str:
        """Mean and standard deviation; a dash where there is no mean."""
        if row is None or row["mean"] is None:
            return "–"
        factor = 100 if self.percent else 1
        mean = f"{factor * row['mean']:{self.digits}}"
        return mean if row["std"] is None else f"{mean}{plus_minus}{factor * row['std']:{self.digits}}"


HEADLINES = (
    Headline("train_accuracy", "train\nacc. %", ".2f", percent=True),
    Headline("test_accuracy", "test\nacc. %", ".2f", percent=True),
    Headline("epochs_to_100", "100%\nepoch", ".1f"),
    Headline("train_nc1_trace", "NC1\ntrace", ".2g"),
    Headline("train_nc2_etf_distance_means", "NC2\nETF", ".2g"),
    Headline("train_nc3_distance", "NC3\ndual", ".2g"),
    Headline("test_nc4_disagreement", "NC4\ntest %", ".2f", percent=True),
    Headline("train_margin_mean", "cosine\nmargin"),
)


def write_tables(folder: Path, runs: Sequence[Run]) -> list[Path]:
    """Write every number as ``measures.csv``, and the summary as ``summary.csv`` and ``summary.json``."""
    rows = summary_rows(runs)
    return [
        write_csv(folder / "measures.csv", tidy_rows(runs)),
        write_csv(folder / "summary.csv", rows),
        write_json(folder / "summary.json", rows),
    ]


def tidy_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A long table: one row for each number that exists."""
    return [
        {"head": run.head, "seed": run.seed, "epoch": int(row["epoch"]), "measure": measure, "value": value}
        for run in runs
        for row in run.history
        for measure, value in existing(row).items()
    ]


def summary_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row for each head and measure: its last value over the seeds.

    ``epochs_to_100`` is the first epoch with a train accuracy of 1, ``epochs_to_etf_X`` the first at which
    the class means are no further than X from their nearest ETF. ``seeds`` counts those that have a value;
    where some seed has none, the statistics are empty: a mean over those that got there would flatter.
    """
    rows = []
    for head in dict.fromkeys(run.head for run in runs):
        same = [run for run in runs if run.head == head]
        last = [existing(run.history[-1]) for run in same]
        for measure in dict.fromkeys(measure for row in last for measure in row):
            rows.append(_summary(head, measure, [row.get(measure) for row in last]))
        for measure, reached in _milestones().items():
            rows.append(_summary(head, measure, [_first_epoch(run.history, reached) for run in same]))
    return rows


def _milestones() -> dict[str, Callable[[Row], bool]]:
    distance = "train_nc2_etf_distance_means"
    return {"epochs_to_100": lambda row: row["train_accuracy"] == 1} | {
        f"epochs_to_etf_{bound}": lambda row, bound=bound: row.get(distance, math.inf) <= bound
        for bound in ETF_THRESHOLDS
    }


def _first_epoch(history: Sequence[Row], reached: Callable[[Row], bool]) -> float | None:
    return next((row["epoch"] for row in history if reached(row)), None)


def _summary(head: str, measure: str, values: Sequence[float | None]) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    complete = len(known) == len(values)
    return {
        "head": head,
        "measure": measure,
        "mean": fmean(known) if complete else None,
        "std": stdev(known) if complete and len(known) > 1 else None,
        "median": median(known) if complete else None,
        "min": min(known) if complete else None,
        "max": max(known) if complete else None,
        "seeds": len(known),
    }


def by_head(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """The rows of :func:`summary_rows` by head and measure."""
    table: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        table.setdefault(row["head"], {})[row["measure"]] = row
    return table


def summary_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """The headline measures of each head, mean above standard deviation, for the terminal."""
    table = make_table(title, "head", *(column.heading for column in HEADLINES))
    for head, measures in by_head(rows).items():
        cells = (column.text(measures.get(column.measure), "\n±") for column in HEADLINES)
        table.add_row(head.replace("-", "-\n"), *cells)
    return table


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The same as Markdown, for a document."""
    headings = ["head", *(column.heading.replace("\n", " ") for column in HEADLINES)]
    lines = [headings, ["---"] + ["---:"] * len(HEADLINES)]
    for head, measures in by_head(rows).items():
        lines.append([head, *(column.text(measures.get(column.measure)) for column in HEADLINES)])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
