"""Tables and pictures of the study of kernel inducing points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from comparison.reporting import make_table
from distillation.images.report import percent

Row = dict[str, Any]

# Colors of Okabe and Ito, which the color-blind can tell apart; solved labels are dashed.
COLOURS = {
    "learned": "#D55E00",
    "random images": "#56B4E9",
    "class means": "#4D4D4D",
    "k-means centers": "#0072B2",
}


def summary_rows(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """One row for each learner, kind of set and number of images: mean and deviation over seeds and draws."""
    keys = dict.fromkeys((row["learner"], row["per_class"], row["images"], row["labels"]) for row in rows)
    summary = []
    for key in keys:
        learner, per_class, images, labels = key
        same = [
            row for row in rows if (row["learner"], row["per_class"], row["images"], row["labels"]) == key
        ]
        entry: Row = {
            "learner": learner,
            "per_class": per_class,
            "images": images,
            "labels": labels,
            "sets": len(same),
        }
        for name in ("train_accuracy", "test_accuracy"):
            values = [row[name] for row in same]
            entry[name] = fmean(values)
            entry[f"{name}_std"] = stdev(values) if len(values) > 1 else None
        rates = sorted({row["rate"] for row in same if row.get("rate") is not None})
        entry["rates"] = ", ".join(f"{rate:g}" for rate in rates) or None
        summary.append(entry)
    return summary


def summary_table(summary: Sequence[Mapping[str, Any]], learner: str, title: str) -> Table:
    """Test accuracy of one learner in per cent: a row for each kind of set, a column for each size."""
    mine = [row for row in summary if row["learner"] == learner]
    sizes = sorted({row["per_class"] for row in mine})
    table = make_table(title, "images", "labels", *(f"{size} a class" for size in sizes))
    for kind in dict.fromkeys((row["images"], row["labels"]) for row in mine):
        same = {row["per_class"]: row for row in mine if (row["images"], row["labels"]) == kind}
        cells = [
            percent(same[size]["test_accuracy"], same[size]["test_accuracy_std"]) if size in same else "–"
            for size in sizes
        ]
        table.add_row(*kind, *cells)
    return table


def accuracy_figure(summary: Sequence[Mapping[str, Any]], full: float | None, title: str) -> Figure:
    """Test accuracy by images of a class, a panel for each learner."""
    learners = list(dict.fromkeys(row["learner"] for row in summary))
    figure = Figure(figsize=(2.2 + 3.6 * len(learners), 4), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, len(learners), sharey=True, squeeze=False)[0]
    for axes, learner in zip(panels, learners, strict=True):
        mine = [row for row in summary if row["learner"] == learner]
        for kind in dict.fromkeys((row["images"], row["labels"]) for row in mine):
            images, labels = kind
            same = sorted(
                (row for row in mine if (row["images"], row["labels"]) == kind),
                key=lambda row: row["per_class"],
            )
            means = [row["test_accuracy"] for row in same]
            deviations = [row["test_accuracy_std"] or 0.0 for row in same]
            axes.errorbar(
                [row["per_class"] for row in same],
                means,
                yerr=deviations,
                color=COLOURS[images],
                linestyle="--" if labels == "solved" else "-",
                marker="o",
                markersize=4,
                label=f"{images}, labels {labels}",
            )
        if learner == "kernel" and full is not None:
            axes.axhline(full, color="#999999", linestyle=":", label="all training images")
        sizes = sorted({row["per_class"] for row in mine})
        axes.set(title=f"trained: {learner}", xlabel="images of a class", xscale="log")
        axes.set_xticks(sizes, labels=[str(size) for size in sizes])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%")
    panels[0].set_ylabel("test accuracy")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    return figure


def learning_figure(histories: Mapping[int, Sequence[Sequence[Row]]], title: str) -> Figure:
    """Loss and accuracy on the batches of real images by outer step, a line for each size."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    for color, (per_class, runs) in zip(
        ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00") * 2, histories.items(), strict=False
    ):
        for axes, name in ((left, "loss"), (right, "accuracy")):
            values = np.asarray([[row[name] for row in history] for history in runs])
            axes.plot(values.mean(0), color=color, label=f"{per_class} a class", linewidth=1)
    left.set(title="Squared error on real batches", yscale="log", xlabel="outer step")
    for axis_formatter in (left.yaxis.set_major_formatter, left.yaxis.set_minor_formatter):
        axis_formatter(lambda value, _: f"{value:g}")
    right.set(title="Accuracy on real batches", xlabel="outer step")
    right.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%")
    left.legend()
    return figure
