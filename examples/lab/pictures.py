"""What trainings of heads look like. Curves are means over the seeds, with a band from lowest to highest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from etflayers.metrics import plot_cosines, plot_tetrahedron
from lab import figures
from lab.classifiers import Trained
from lab.figures import HEAD_COLORS, draw_band, in_percent, new_figure
from lab.measures import MEASURES, PARTS, existing

Runs = Sequence[Trained]

NC2_DISTANCE = "train_nc2_etf_distance_means"
# The measures that stand for NC1 to NC4 where there is room for four (all: docs/understand/metrics.md).
HEADLINES = ["train_nc1_trace", NC2_DISTANCE, "train_nc3_distance", "test_nc4_disagreement"]
NC2 = ["train_nc2_equinorm_means", "train_nc2_equiangularity_mean_means", NC2_DISTANCE]
NC4 = ["train_nc4_disagreement", "test_nc4_disagreement"]
COLLAPSE = ["train_nc1_trace", *NC2, "train_nc3_distance", *NC4, "train_margin_mean"]
OTHER_DISTANCES = ["train_nc2_etf_distance_weights", "train_nc3_etf_distance", "train_nc2_etf_drift_means"]
DECADES = 4  # depth of a logarithmic axis: below are rounding errors of heads that are ETFs by construction


def comparison_pictures(runs: Runs, title: str) -> dict[str, Callable[[], Figure]]:
    """The few of a comparison, by name."""
    makers: dict[str, Callable[..., Figure]] = {
        "accuracy": accuracy_figure,
        "loss": loss_figure,
        "collapse": partial(measure_figure, HEADLINES, 4),
        "cosines": cosine_figure,
        "overview": overview_figure,
    }
    return {name: partial(make, runs, title) for name, make in makers.items()}


def study_pictures(runs: Runs, title: str) -> dict[str, Callable[[], Figure]]:
    """All that a study shows, by name."""
    makers: dict[str, Callable[..., Figure]] = {
        "collapse": partial(measure_figure, COLLAPSE, 4),
        "measures": partial(measure_figure, all_of("train"), 5),
        "measures_test": partial(measure_figure, all_of("test"), 5),
        "etf_distances": partial(measure_figure, [NC2_DISTANCE, *OTHER_DISTANCES], 4),
        "margins": margin_figure,
        "cosines": cosine_figure,
        "accuracy": accuracy_figure,
        "loss": loss_figure,
    }
    if len(runs[0].snapshots["last_frame"]) == 4:
        makers["class_means_3d"] = tetrahedron_figure
    return {name: partial(make, runs, title) for name, make in makers.items()}


def all_of(part: str) -> list[str]:
    """All measures of collapse on a part of the data."""
    return [f"{part}_{name}" for name in MEASURES if name not in ("accuracy", "loss")]


def accuracy_figure(runs: Runs, title: str) -> Figure:
    """Accuracy by epoch on the training and on the test set."""
    figure = new_figure(9, 3.8, title)
    for axes, part in zip(figure.subplots(1, 2, sharey=True), PARTS, strict=True):
        _draw_accuracy(axes, runs, part, PARTS)
    figure.axes[1].legend(loc="lower right")
    return figure


def loss_figure(runs: Runs, title: str) -> Figure:
    """Loss by epoch on the training and on the test set."""
    figure = new_figure(9, 3.8, title)
    for axes, part in zip(figure.subplots(1, 2), PARTS, strict=True):
        draw_curves(axes, runs, f"{part}_loss")
        axes.set(title=f"{part.capitalize()} loss", yscale="log")
    figure.axes[1].legend(loc="upper right")
    return figure


def measure_figure(names: Sequence[str], columns: int, runs: Runs, title: str) -> Figure:
    """A panel by epoch for each of the named measures that some run has."""
    shown = [name for name in names if any(name in existing(run.last) for run in runs)]
    rows = math.ceil(len(shown) / columns)
    figure = new_figure(2.9 * columns, 0.9 + 2.3 * rows, title)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    for axes, name in zip(panels, shown, strict=False):
        _draw_measure(axes, runs, name)
    for above in panels[: len(shown) - columns]:
        above.set_xlabel("")
    for lowest in panels[max(len(shown) - columns, 0) : len(shown)]:
        lowest.tick_params(labelbottom=True)
    for unused in panels[len(shown) :]:
        unused.remove()
    figures.legend_of_heads(figure, (run.head for run in runs))
    return figure


def cosine_figure(runs: Runs, title: str) -> Figure:
    """Cosines between class means and between the rows of the frame at the end of training, for each head."""
    shown = _one_of_each_head(runs)
    title = f"Cosines, centered, after {int(shown[0].last['epoch'])} epochs: {title}"
    figure = new_figure(1.2 + 2.3 * len(shown), 5.2, title)
    grid = figure.subplots(2, len(shown), squeeze=False)
    for column, run in enumerate(shown):
        for axes, what in zip(grid[:, column], ("class_means", "frame"), strict=True):
            plot_cosines(run.snapshots[f"last_{what}"], axes)
        grid[0, column].set_title(run.head, color=HEAD_COLORS[run.head])
    grid[0, 0].set_ylabel("class means")
    grid[1, 0].set_ylabel("frame")
    _color_bar(figure, list(grid.flat), shown[0])
    return figure


def overview_figure(runs: Runs, title: str) -> Figure:
    """Test accuracy, distance to the nearest ETF, and the class means of one head before and after."""
    figure = new_figure(13, 3.9, title)
    curves, matrices = figure.subfigures(1, 2, width_ratios=(1.3, 1), wspace=0.03)
    accuracy, distance = curves.subplots(1, 2)
    _draw_accuracy(accuracy, runs, "test", ["test"])
    accuracy.legend(loc="lower right")
    draw_curves(distance, runs, NC2_DISTANCE)
    distance.set(title="Class means to nearest ETF", ylabel="distance")
    distance.set_ylim(bottom=0)

    shown = _one_of_each_head(runs)
    run = next((run for run in shown if run.head == "nearest"), shown[0])
    grid = matrices.subplots(1, 2)
    moments = {"first": "at the start", "last": f"after {int(run.last['epoch'])} epochs"}
    for axes, (moment, label) in zip(grid, moments.items(), strict=True):
        plot_cosines(run.snapshots[f"{moment}_class_means"], axes)
        axes.set_xlabel(label)
    matrices.suptitle(f"Cosines of class means, {run.head} head", fontsize=11, fontweight="bold")
    _color_bar(matrices, list(grid), run)
    return figure


def margin_figure(runs: Runs, title: str) -> Figure:
    """The curves P_CM: the cosine margins of all samples in ascending order."""
    figure = new_figure(9, 4.2, title)
    train, test = figure.subplots(1, 2, sharey=True)
    _draw_margins(train, runs, "first_train_margins", linestyle="dotted")
    _draw_margins(train, runs, "last_train_margins")
    _draw_margins(test, runs, "last_test_margins")
    train.set(title="Train, before (dotted) and after training", ylabel="cosine margin")
    test.set(title="Test, after training")
    figures.legend_of_heads(figure, (run.head for run in runs))
    return figure


def tetrahedron_figure(runs: Runs, title: str) -> Figure:
    """Four class means and four classifier rows in space, before and after training, for each head.

    They are seen in the span of the centered class means, turned such that the nearest simplex ETF is the
    same regular tetrahedron in every panel.
    """
    shown = _one_of_each_head(runs)
    figure = new_figure(0.6 + 2.2 * len(shown), 4.6, title)
    grid = figure.subplots(2, len(shown), squeeze=False, subplot_kw={"projection": "3d"})
    for column, run in enumerate(shown):
        for axes, moment in zip(grid[:, column], ("first", "last"), strict=True):
            means, frame = (run.snapshots[f"{moment}_{what}"] for what in ("class_means", "frame"))
            names = {"features": "last_features", "targets": "last_features_targets"}
            cloud = {key: run.snapshots.get(name) for key, name in names.items() if moment == "last"}
            plot_tetrahedron(means, frame, ax=axes, **cloud)
        grid[0, column].set_title(run.head, color=HEAD_COLORS[run.head])
    for axes, label in zip(grid[:, 0], ("before", "after"), strict=True):
        axes.text2D(-0.05, 0.5, label, transform=axes.transAxes, rotation=90, va="center", ha="right")
    marks = [
        Line2D([], [], color=figures.GREY, marker="o", linestyle="none", label="class mean"),
        Line2D([], [], color=figures.GREY, marker="^", markerfacecolor="none", label="classifier row"),
        Line2D([], [], color="#BBBBBB", linewidth=1, label="nearest simplex ETF"),
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=3)
    return figure


def draw_curves(axes: Axes, runs: Runs, name: str) -> None:
    """A measure of each head by epoch."""
    epochs = np.arange(len(runs[0].history))
    for head, color in HEAD_COLORS.items():
        curves = [[row.get(name, np.nan) for row in run.history] for run in runs if run.head == head]
        draw_band(axes, epochs, curves, color=color, label=head)
    axes.set_xlabel("epoch")
    axes.set_xlim(0, runs[0].last["epoch"])
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _one_of_each_head(runs: Runs) -> list[Trained]:
    return list({run.head: run for run in reversed(runs)}.values())[::-1]


def _draw_accuracy(axes: Axes, runs: Runs, part: str, cut_by: Iterable[str]) -> None:
    """On an axis cut by what these parts have at the end: their steep beginning would squeeze it."""
    draw_curves(axes, runs, f"{part}_accuracy")
    late = [row for run in runs for row in run.history if row["epoch"] >= 0.2 * run.last["epoch"]]
    lowest = min(row[f"{part}_accuracy"] for part in cut_by for row in late)
    lowest = max(0.0, 1 - 1.3 * (1 - lowest) - 0.005)
    axes.set(title=f"{part.capitalize()} accuracy", ylim=(lowest, 1 + 0.03 * (1 - lowest)))
    in_percent(axes)


def _draw_measure(axes: Axes, runs: Runs, name: str) -> None:
    part, _, measure = name.partition("_")
    draw_curves(axes, runs, name)
    axes.set_title(f"{MEASURES[measure].label}\n{PARTS[part]}", fontsize=9, pad=5)
    if MEASURES[measure].ideal == 0:
        _scale_towards_zero(axes, np.array([row.get(name, np.nan) for run in runs for row in run.history]))


def _scale_towards_zero(axes: Axes, values: np.ndarray) -> None:
    """A logarithmic axis for what falls by more than a factor of ten, else one that begins at zero.

    A curve that leaves the logarithmic axis below is zero or negligible.
    """
    positive = values[values > 0]
    if not len(positive) or positive.max() < 10 * positive.min():
        axes.set_ylim(bottom=0)
        return
    bottom = max(positive.min(), positive.max() / 10**DECADES)
    axes.set_yscale("log", nonpositive="clip")
    axes.set_ylim(bottom / 1.5, positive.max() * 1.5)
    figures.in_plain_numbers(axes)


def _color_bar(figure: FigureBase, axes: list[Axes], run: Trained) -> None:
    """A bar with a tick where all cosines of different classes end up in a simplex ETF."""
    bar = figure.colorbar(axes[0].images[0], ax=axes, shrink=0.8, aspect=25, pad=0.03)
    others = len(run.snapshots["last_frame"]) - 1
    bar.set_ticks([-1, -1 / others, 1], labels=["−1", f"−1/{others}", "1"])
    bar.outline.set_visible(False)


def _draw_margins(axes: Axes, runs: Runs, snapshot: str, linestyle: str = "solid") -> None:
    for head, color in HEAD_COLORS.items():
        curves = [run.snapshots[snapshot].numpy() for run in runs if run.head == head]
        if curves:
            share = (np.arange(len(curves[0])) + 0.5) / len(curves[0])
            draw_band(axes, share, curves, color=color, linestyle=linestyle)
    axes.axhline(0, color="#999999", linewidth=0.8)
    axes.set(xlim=(0, 1), xlabel="share of the samples", xticks=(0, 0.25, 0.5, 0.75))
