"""Tables and pictures of the study of collapse on distilled data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from comparison.reporting import make_table

Row = dict[str, Any]

# The measures that stand for NC1 to NC4 (docs/metrics.md has all of them).
COLLAPSE = {
    "nc1_trace": "NC1: trace ratio",
    "nc2_etf_distance_means": "NC2: means to nearest ETF",
    "nc3_distance": "NC3: classifier to means",
    "nc4_disagreement": "NC4: disagreement",
}
# Colors of Okabe and Ito, which the color-blind can tell apart.
COLOURS = ("#4D4D4D", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def summary_rows(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """One row for each set and head: mean and deviation over the seeds of every measure at the last step.

    Where some seed has no value, because its class means coincide, there is none.
    """
    summary = []
    for name, head in dict.fromkeys((row["set"], row["head"]) for row in rows):
        runs = [row for row in rows if (row["set"], row["head"]) == (name, head)]
        last = max(row["step"] for row in runs)
        same = [row for row in runs if row["step"] == last]
        entry: Row = {"set": name, "images": same[0]["images"], "head": head, "seeds": len(same)}
        for measure in (key for key in same[0] if key.startswith(("own_", "train_", "test_"))):
            values = [row.get(measure, math.nan) for row in same]
            entry[measure] = fmean(values)
            entry[f"{measure}_std"] = stdev(values) if len(values) > 1 else None
        summary.append(entry)
    return summary


def summary_table(summary: Sequence[Mapping[str, Any]], title: str) -> Table:
    """Accuracy and collapse on real images."""
    columns = {
        "test\nacc. %": ("test_accuracy", 100, ".1f"),
        "NC1\ntrain": ("train_nc1_trace", 1, ".3g"),
        "NC2 ETF\ntrain": ("train_nc2_etf_distance_means", 1, ".3f"),
        "NC3 dual\ntrain": ("train_nc3_distance", 1, ".3f"),
        "NC4 %\ntest": ("test_nc4_disagreement", 100, ".1f"),
        "margin\ntest": ("test_margin_mean", 1, ".3f"),
    }
    return _table(summary, title, columns)


def own_table(summary: Sequence[Mapping[str, Any]], title: str) -> Table:
    """Accuracy and collapse on the images that the networks were trained on."""
    columns = {
        "acc. %": ("own_accuracy", 100, ".1f"),
        "NC1": ("own_nc1_trace", 1, ".2g"),
        "NC2 ETF": ("own_nc2_etf_distance_means", 1, ".3f"),
        "NC3 dual": ("own_nc3_distance", 1, ".3f"),
        "NC4 %": ("own_nc4_disagreement", 100, ".1f"),
        "margin": ("own_margin_mean", 1, ".3f"),
    }
    return _table(summary, title, columns)


def _table(
    summary: Sequence[Mapping[str, Any]], title: str, columns: Mapping[str, tuple[str, float, str]]
) -> Table:
    table = make_table(title, "trained on", "head", *columns)
    for row in summary:
        cells = []
        for name, factor, digits in columns.values():
            value, deviation = row.get(name), row.get(f"{name}_std")
            text = "–" if value is None or math.isnan(value) else f"{factor * value:{digits}}"
            cells.append(text if deviation is None or text == "–" else f"{text}\n± {factor * deviation:.1g}")
        table.add_row(row["set"], row["head"], *cells)
    return table


def curves_figure(rows: Sequence[Mapping[str, Any]], part: str, title: str) -> Figure:
    """Test accuracy, and NC1 to NC4 on a part of the images, by step: a column for each head.

    NC4 on real images is that of the test set.
    """
    heads = list(dict.fromkeys(row["head"] for row in rows))
    sets = list(dict.fromkeys(row["set"] for row in rows))
    measures = {"test_accuracy": "test accuracy"} if part == "train" else {"own_accuracy": "accuracy"}
    for name, label in COLLAPSE.items():
        source = "test" if part == "train" and name == "nc4_disagreement" else part
        measures[f"{source}_{name}"] = label
    figure = Figure(figsize=(1.6 + 3.3 * len(heads), 2.1 * len(measures)), layout="constrained")
    images = "real images" if part == "train" else "the images trained on"
    figure.suptitle(f"{title}: measured on {images}")
    grid = figure.subplots(len(measures), len(heads), sharex=True, sharey="row", squeeze=False)
    for column, head in enumerate(heads):
        grid[0, column].set_title(f"{head} head")
        grid[-1, column].set_xlabel("training step")
        for line, measure in enumerate(measures):
            axes = grid[line, column]
            for name, color in zip(sets, COLOURS * len(sets), strict=False):
                same = [row for row in rows if row["set"] == name and row["head"] == head]
                seeds = dict.fromkeys(row["seed"] for row in same)
                steps = sorted({row["step"] for row in same})
                values = np.asarray(
                    [[row.get(measure, np.nan) for row in same if row["seed"] == seed] for seed in seeds]
                )
                if name.endswith("own steps"):  # its end alone, which is no point of a curve
                    end = {"color": color, "marker": "D", "markersize": 5, "linestyle": "none"}
                    axes.plot([steps[-1]] * len(values), values[:, -1], label=name, **end)
                    continue
                axes.plot(steps, values.mean(0), color=color, label=name)
                axes.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)
            axes.set_xscale("symlog", linthresh=1)
            if measure.endswith("nc1_trace"):
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
                axes.yaxis.set_minor_formatter(lambda value, _: "")
            elif measure.endswith(("accuracy", "disagreement")):
                axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%")
    for line, label in enumerate(measures.values()):
        grid[line, 0].set_ylabel(label.replace(": ", "\n"))
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure
