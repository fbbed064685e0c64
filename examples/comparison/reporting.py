"""Tables: CSV and JSON for programs, rich tables for people."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich import box
from rich.table import Table

from comparison.checkpoints import write_atomically
from comparison.costs import Memory, StepTime
from comparison.settings import HeadName
from comparison.training import Run

MEASURES = (
    "train_accuracy",
    "test_accuracy",
    "train_loss",
    "test_loss",
    "train_nc1_trace",
    "train_nc2_etf_distance_means",
    "train_nc3_distance",
    "test_nc4_disagreement",
    "test_margin_mean",
)


def write_json(path: Path, content: Any) -> Path:
    """Numbers that do not exist (NaN, infinity) become null."""
    content = _finite(content)
    write_atomically(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())
    return path


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """A column for each name that occurs in a row; what does not exist stays empty."""
    text = io.StringIO(newline="")
    names = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(_finite(list(rows)))
    write_atomically(path, text.getvalue().encode())
    return path


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return content


def write_run(folder: Path, run: Run, settings: Mapping[str, Any]) -> list[Path]:
    """Every epoch of a run as CSV, and as JSON with the settings that gave it."""
    content = {
        "head": run.head,
        "seed": run.seed,
        "settings": settings,
        "epochs_to_fit": run.epochs_to_fit,
        "history": run.history,
    }
    return [
        write_csv(folder / f"{run.name}.csv", run.history),
        write_json(folder / f"{run.name}.json", content),
    ]


def summary_rows(runs: Sequence[Run], times: Mapping[HeadName, StepTime]) -> list[dict[str, Any]]:
    """One row for each head: last values as mean and standard deviation over the seeds, and costs.

    A deviation is empty where there is one seed, the epochs to 99.9% where some seed has not got there.
    """
    rows = []
    for head, time in times.items():
        same = [run for run in runs if run.head == head]
        row: dict[str, Any] = {"head": head, "seeds": len(same)}
        for name in MEASURES:
            values = [run.last.get(name, math.nan) for run in same]
            row[name] = fmean(values)
            row[f"{name}_std"] = stdev(values) if len(values) > 1 else None
        epochs = [run.epochs_to_fit for run in same if run.epochs_to_fit is not None]
        row["fitted_seeds"] = len(epochs)
        row["epochs_to_fit"] = fmean(epochs) if len(epochs) == len(same) else None
        row |= {"ms_per_step": time.step, "head_ms": time.head, "head_share": time.share}
        rows.append(row)
    return rows


def summary_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """Accuracy and cost, from the rows of :func:`summary_rows`."""
    table = make_table(
        title,
        "head",
        "train\naccuracy %",
        "test\naccuracy %",
        "epochs to\n99.9%",
        "ms\na step",
        "head\nshare",
    )
    for row in rows:
        table.add_row(
            row["head"],
            _percent(row, "train_accuracy"),
            _percent(row, "test_accuracy"),
            _epochs(row),
            f"{row['ms_per_step']:.1f}",
            f"{row['head_share']:.1%}",
        )
    return table


def collapse_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """NC1 to NC4 at the end, from the rows of :func:`summary_rows`."""
    table = make_table(
        "Neural collapse at the end (see docs/metrics.md)",
        "head",
        "NC1\ntrace",
        "NC2, ETF\ndistance",
        "NC3, dual\ndistance",
        "NC4 test\nmismatch %",
        "cosine margin\non test images",
    )
    for row in rows:
        table.add_row(
            row["head"],
            _number(row, "train_nc1_trace"),
            _number(row, "train_nc2_etf_distance_means"),
            _number(row, "train_nc3_distance"),
            _percent(row, "test_nc4_disagreement"),
            _number(row, "test_margin_mean"),
        )
    return table


def _percent(row: Mapping[str, Any], name: str) -> str:
    deviation = row[f"{name}_std"]
    mean = f"{100 * row[name]:.2f}"
    return mean if deviation is None else f"{mean} ± {100 * deviation:.2f}"


def _number(row: Mapping[str, Any], name: str) -> str:
    deviation = row[f"{name}_std"]
    return f"{row[name]:.3f}" if deviation is None else f"{row[name]:.3f} ± {deviation:.3f}"


def _epochs(row: Mapping[str, Any]) -> str:
    if row["epochs_to_fit"] is not None:
        return f"{row['epochs_to_fit']:.3g}"
    return "never" if row["seeds"] == 1 else f"{row['fitted_seeds']} of {row['seeds']} seeds"


def memory_table(report: Sequence[Memory], batch_size: int) -> Table:
    """The sizes of :func:`comparison.costs.memory_report`, and what is saved against its first row."""
    table = make_table(
        "What the number of features saves",
        "head",
        "features",
        "parameters",
        f"memory, batch of {batch_size}",
    )
    table.caption = (
        "memory: parameters, gradients, optimizer states and activations kept for the backward pass"
    )
    table.caption_justify = "left"
    default = report[0]
    for size in report:
        saved_parameters = _saved(size.parameters, default.parameters)
        saved_bytes = _saved(size.memory, default.memory)
        table.add_row(
            size.label,
            str(size.features),
            f"{size.parameters:,}{saved_parameters}",
            f"{size.memory / 2**20:.1f} MiB{saved_bytes}",
        )
    return table


def _saved(size: int, default: int) -> str:
    return "" if size == default else f" ({size / default - 1:+.1%})"


def make_table(title: str, *headings: str) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "head" else "right", no_wrap=True)
    return table
