"""Figures of neural collapse on distilled data: by training step, and by the number of images."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lab.figures import PALETTE, draw_band, in_percent, in_plain_numbers, legend_below, new_figure
from lab.files import Row
from lab.results import grouped

ALL, RANDOM = "all real images", "random real images"
# The measures that stand for NC1 to NC4 (docs/understand/metrics.md has all of them).
COLLAPSE = {
    "nc1_trace": "NC1: trace ratio",
    "nc2_etf_distance_means": "NC2: means to nearest ETF",
    "nc3_distance": "NC3: classifier to means",
    "nc4_disagreement": "NC4: disagreement",
}


def curves_figure(rows: Sequence[Row], part: str, title: str) -> Figure:
    """Test accuracy, and NC1 to NC4 on a part of the images, by step: a column for each head.

    NC4 on real images is that of the test set.
    """
    heads, colors = grouped(rows, "head"), dict(zip(grouped(rows, "set"), PALETTE * len(rows), strict=False))
    measures = {"test_accuracy": "test accuracy"} if part == "train" else {"own_accuracy": "accuracy"}
    for name, label in COLLAPSE.items():
        source = "test" if part == "train" and name == "nc4_disagreement" else part
        measures[f"{source}_{name}"] = label
    images = "real images" if part == "train" else "the images trained on"
    size = (1.6 + 3.3 * len(heads), 2.1 * len(measures))
    figure = new_figure(*size, f"{title}: measured on {images}")
    grid = figure.subplots(len(measures), len(heads), sharex=True, sharey="row", squeeze=False)
    for line, (measure_name, label) in zip(grid, measures.items(), strict=True):
        line[0].set_ylabel(label.replace(": ", "\n"))
        for axes, mine in zip(line, heads.values(), strict=True):
            for (name,), same in grouped(mine, "set").items():
                runs = grouped(same, "seed").values()
                curves = [[row.get(measure_name, np.nan) for row in run] for run in runs]
                steps, color = sorted({row["step"] for row in same}), colors[name,]
                shown = _label(name)
                if name.endswith("own steps"):  # its end alone, which is no point of a curve
                    end = {"color": color, "marker": "D", "markersize": 5, "linestyle": "none"}
                    axes.plot([steps[-1]] * len(curves), [curve[-1] for curve in curves], label=shown, **end)
                else:
                    draw_band(axes, steps, curves, color=color, label=shown)
            axes.set_xscale("symlog", linthresh=1)
            if measure_name.endswith("nc1_trace"):
                axes.set_yscale("log")
                in_plain_numbers(axes)
            elif measure_name.endswith(("accuracy", "disagreement")):
                in_percent(axes)
    for top, bottom, (head,) in zip(grid[0], grid[-1], heads, strict=True):
        top.set_title(f"{head} head")
        bottom.set_xlabel("training step")
    legend_below(figure, grid[0, 0])
    return figure


def kind(name: str) -> str:
    """What sets of several sizes have in common: their name without numbers."""
    return re.sub(r"[-_ ]*\d+[-_ ]*", " ", name).strip()


def several_sizes(summary: Sequence[Row]) -> bool:
    """Whether there is something to compare: real images of two numbers at least."""
    return len({row["images"] for row in summary if kind(row["set"]) == RANDOM}) > 1


def sizes_figure(summary: Sequence[Row], title: str) -> Figure:
    """Test accuracy and NC1 to NC3 on real images by the number of images trained on: a column for each head.

    Means over the seeds, with their deviation; all real images are a line across.
    """
    measures = {"test_accuracy": "test accuracy"}
    measures |= {f"train_{name}": label for name, label in COLLAPSE.items() if name != "nc4_disagreement"}
    heads = grouped(summary, "head")
    kinds = dict.fromkeys(kind(row["set"]) for row in summary if row["set"] != ALL)
    colors = dict(zip(kinds, PALETTE * len(kinds), strict=False))
    figure = new_figure(1.6 + 3.3 * len(heads), 2.1 * len(measures), f"{title}: measured on real images")
    grid = figure.subplots(len(measures), len(heads), sharex=True, sharey="row", squeeze=False)
    for line, (measure, label) in zip(grid, measures.items(), strict=True):
        line[0].set_ylabel(label.replace(": ", "\n"))
        for axes, mine in zip(line, heads.values(), strict=True):
            for name, color in colors.items():
                same = sorted(
                    (row for row in mine if kind(row["set"]) == name and row["set"] != ALL),
                    key=lambda row: row["images"],
                )
                means = [_known(row, measure, np.nan) for row in same]
                deviations = [_known(row, f"{measure}_std", 0.0) for row in same]
                style = {"color": color, "linestyle": "--" if name == RANDOM else "-", "marker": "o"}
                images = [row["images"] for row in same]
                axes.errorbar(images, means, yerr=deviations, markersize=4, label=_label(name), **style)
            whole = next(row for row in mine if row["set"] == ALL)
            if whole.get(measure) is not None:
                axes.axhline(whole[measure], color="#999999", linestyle=":", label=ALL)
            axes.set_xscale("log")
            if measure.endswith("accuracy"):
                in_percent(axes)
            else:
                axes.set_yscale("log")
                in_plain_numbers(axes)
    for top, bottom, (head,) in zip(grid[0], grid[-1], heads, strict=True):
        top.set_title(f"{head} head")
        sizes = sorted({row["images"] for row in summary if row["set"] != ALL})
        bottom.set_xticks(sizes, labels=[str(size) for size in sizes])
        bottom.minorticks_off()
        bottom.set_xlabel("images trained on")
    legend_below(figure, grid[0, 0])
    return figure


def _label(name: str) -> str:
    """As a legend shows it: matplotlib hides what begins with _."""
    return f" {name}" if name.startswith("_") else name


def _known(row: Mapping[str, Any], name: str, otherwise: float) -> float:
    value = row.get(name)
    return otherwise if value is None else float(value)
