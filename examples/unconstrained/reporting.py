"""Tables of runs: CSV and JSON for programs, a rich table for people."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from comparison.reporting import make_table, write_csv, write_json
from unconstrained.descent import Run
from unconstrained.settings import Settings

DISTANCES = (0.05, 0.01)  # of the class means to their nearest ETF
RIVALS = ("fixed", "standard")


def write_runs(path: Path, runs: Sequence[Run]) -> Path:
    """One row for each run and measured step."""
    return write_csv(path, [{**run.key._asdict(), **row} for run in runs for row in run.history])


def write_summary(path: Path, settings: Settings, tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> Path:
    """The rows of :func:`summary_rows` with the settings that gave them; null where a median is "never"."""
    content: dict[str, Any] = {"settings": settings.fingerprint()}
    for name, rows in tables.items():
        content[name] = [
            {key: None if value == math.inf else value for key, value in row.items()} for row in rows
        ]
    return write_json(path, content)


def summary_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """For each K and head the median, lowest and highest number of steps over the seeds; infinite: never.

    ``over_fixed`` and ``over_standard`` are ratios of medians, there if both heads have got so far.
    """
    groups: dict[tuple[int, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.key.classes, run.key.head), []).append(run)
    rows = []
    for (classes, head), same in groups.items():
        row: dict[str, Any] = {"classes": classes, "head": head, "lr": same[0].key.lr, "seeds": len(same)}
        for distance in DISTANCES:
            reached = [run.steps_to(distance) for run in same]
            steps = [math.inf if step is None else float(step) for step in reached]
            row |= {
                f"steps_to_{distance:g}": median(steps),
                f"steps_to_{distance:g}_min": min(steps),
                f"steps_to_{distance:g}_max": max(steps),
            }
        for name in ("loss", "accuracy", "etf_distance", "nc1_trace", "nc3_distance", "margin"):
            row[f"last_{name}"] = median(run.history[-1][name] for run in same)
        row["ms_per_step"] = median(1000 * run.seconds / run.history[-1]["step"] for run in same)
        rows.append(row)
    for row in rows:
        for rival in RIVALS:
            of = next((r for r in rows if r["head"] == rival and r["classes"] == row["classes"]), None)
            for distance in DISTANCES:
                name = f"steps_to_{distance:g}"
                known = of is not None and 0 < of[name] < math.inf and row[name] < math.inf
                row[f"{name}_over_{rival}"] = row[name] / of[name] if known and of is not None else None
    return rows


def summary_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """The rows of :func:`summary_rows` for reading: median, lowest-highest, and the ratios of medians."""
    table = make_table(title)
    named = "options" if "options" in rows[0] else "head"
    table.add_column(named, no_wrap=True)
    table.add_column("lr", justify="right", no_wrap=True)
    rivals = [rival for rival in RIVALS if any(row["head"] == rival for row in rows)]
    for distance in DISTANCES:
        table.add_column(f"to {distance:g}", justify="right")
        for rival in rivals:
            table.add_column(f"over\n{rival}", justify="right", no_wrap=True)
    for row in rows:
        cells = [row[named], f"{row['lr']:g}"]
        for distance in DISTANCES:
            name = f"steps_to_{distance:g}"
            low, high = _steps(row[f"{name}_min"]), _steps(row[f"{name}_max"])
            spread = "" if low == high else f" {low}-{high}"
            ratios = (row[f"{name}_over_{rival}"] for rival in rivals)
            cells += [_steps(row[name]) + spread]
            cells += ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        table.add_row(*cells)
    return table


def _steps(count: float) -> str:
    return "never" if math.isinf(count) else f"{count:g}"
