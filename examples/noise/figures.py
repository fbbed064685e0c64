"""Pictures of the study of label noise."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from matplotlib.figure import Figure

from lab.figures import PALETTE, draw_band, in_percent, legend_below, new_figure
from lab.files import Row
from lab.results import grouped

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
    figure = new_figure(6.4, 5)
    axes = figure.subplots()
    computed = grouped(theory, "method")
    for ((method,), same), color in zip(grouped(last, "method").items(), PALETTE, strict=False):
        said = computed.get((method,), [])
        axes.plot(
            [row["memorization"] for row in said],
            [row["dilation"] for row in said],
            color=color,
            linestyle=":",
            marker="x",
        )
        points = [(row["memorization_relative"], row["dilation_relative"]) for row in same]
        axes.scatter(*zip(*points, strict=True), s=10, color=color, alpha=0.5)
        path = [
            (
                fmean(row["memorization_relative"] for row in rows),
                fmean(row["dilation_relative"] for row in rows),
            )
            for rows in grouped(same, "eta").values()
        ]
        axes.plot(*zip(*path, strict=True), color=color, label=method, marker="o", markersize=4)
    axes.set(xlabel="memorization, in distances of two classes", ylabel="dilation of test data, likewise")
    legend_below(figure, axes, columns=4)
    return figure


def curves_figure(last: Sequence[Row]) -> Figure:
    """Four measures over eta: the mean over the seeds, and a band from the lowest to the highest."""
    figure = new_figure(10, 6.4)
    for axes, (measure, title) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        for ((method,), same), color in zip(grouped(last, "method").items(), PALETTE, strict=False):
            runs = list(grouped((row for row in same if measure in row), "seed").values())
            if runs:
                curves = [[row[measure] for row in run] for run in runs]
                draw_band(axes, [row["eta"] for row in runs[0]], curves, color=color, label=method)
        axes.set(title=title, xlabel="eta")
        if measure in SHARES:
            in_percent(axes)
    legend_below(figure, figure.axes[0], columns=4)
    return figure
