"""Pictures of the study of label noise."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan
from statistics import fmean
from typing import get_args

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from lab.figures import GREY, PALETTE, draw_band, in_percent, in_plain_numbers, legend_below, new_figure
from lab.files import Row
from lab.results import grouped
from noise.theory import Loss

PANELS = {
    "test_accuracy": "test accuracy",
    "accuracy_wrong_labels": "wrong labels learned",
    "memorization_relative": "memorization / distance",
    "dilation_relative": "dilation / distance",
}
SHARES = ("test_accuracy", "accuracy_wrong_labels")


def dilation_figure(last: Sequence[Row], theory: Sequence[Row] = ()) -> Figure:
    """Dilation over memorization, a path for each method from no noise to most: means, and each seed.

    Crosses on a dotted path are what theory says of the same noise.
    """
    figure = new_figure(10, 4.6)
    colors = {method: color for (method,), color in zip(grouped(last, "method"), PALETTE, strict=False)}
    panels = {
        "losses": get_args(Loss),
        "heads": ["ce", *(name for name in colors if name not in get_args(Loss))],
    }
    for axes, (title, shown) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for (method,), same in grouped(last, "method").items():
            if method in shown:
                _draw_path(axes, same, "memorization_relative", "dilation_relative", colors[method])
        if title == "losses":
            for (method,), said in grouped(theory, "method").items():
                path = [(row["memorization"], row["dilation"]) for row in said]
                axes.plot(*zip(*path, strict=True), color=colors[method], linestyle=":", marker="x")
        axes.set(title=title, xlabel="memorization / distance of two classes")
    _in_decades(figure.axes[1])
    figure.axes[0].set_ylabel("dilation / distance")
    lines = [Line2D([], [], color=color, label=method) for method, color in colors.items()]
    if theory:
        lines.append(Line2D([], [], color=GREY, linestyle=":", marker="x", label="theory"))
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines))
    return figure


def _draw_path(axes: Axes, rows: Sequence[Row], across: str, up: str, color: str) -> None:
    """A point for each row that has both measures, and a line through the means of each eta."""
    rows = [row for row in rows if across in row and up in row]
    axes.scatter([row[across] for row in rows], [row[up] for row in rows], s=10, color=color, alpha=0.4)
    means = [
        [fmean(row[name] for row in same) for name in (across, up)] for same in grouped(rows, "eta").values()
    ]
    axes.plot([mean[0] for mean in means], [mean[1] for mean in means], color=color, marker="o", markersize=4)


def _in_decades(axes: Axes) -> None:
    """A logarithmic axis for dilation: where a head has failed, classes are all spread and no distance."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    in_plain_numbers(axes)


def curves_figure(last: Sequence[Row]) -> Figure:
    """Four measures over eta: the mean over the seeds, and a band from the lowest to the highest."""
    figure = new_figure(10, 6.4)
    for axes, (measure, title) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        for ((method,), same), color in zip(grouped(last, "method").items(), PALETTE, strict=False):
            runs = list(grouped(same, "seed").values())
            curves = [[row.get(measure, nan) for row in run] for run in runs]
            draw_band(axes, [row["eta"] for row in runs[0]], curves, color=color, label=method)
        axes.set(title=title, xlabel="eta")
        if measure in SHARES:
            in_percent(axes)
        if measure == "dilation_relative":
            _in_decades(axes)
    legend_below(figure, figure.axes[0], columns=4)
    return figure
