"""Pictures of a comparison, as PNG files."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, FigureBase
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from comparison.checkpoints import write_atomically
from comparison.evaluation import centered_cosines
from comparison.settings import HeadName
from comparison.training import Run

# Colors of Okabe and Ito, which the color-blind can tell apart.
COLOURS: dict[HeadName, str] = {
    "linear": "#4D4D4D",
    "standard": "#56B4E9",
    "fixed": "#0072B2",
    "nearest": "#D55E00",
    "nearest-detached": "#E69F00",
    "learned": "#009E73",
}
Maker = Callable[[Sequence[Run], str], Figure]  # from runs and a title

# The measures that stand for NC1 to NC4 in the figures and tables (docs/metrics.md has all of them).
COLLAPSE = {
    "train_nc1_trace": "NC1: trace ratio",
    "train_nc2_etf_distance_means": "NC2: means to nearest ETF",
    "train_nc3_distance": "NC3: classifier to means",
    "test_nc4_disagreement": "NC4: test disagreement",
}
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlepad": 10,
    "figure.dpi": 150,
    "figure.titlesize": 12,
    "font.size": 10,
    "grid.color": "#E6E6E6",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


def write_figures(folder: Path, runs: Sequence[Run], title: str) -> list[Path]:
    """Write all figures of a comparison and return their paths."""
    makers: dict[str, Maker] = {
        "accuracy": accuracy_figure,
        "loss": loss_figure,
        "collapse": collapse_figure,
        "cosines": cosine_figure,
        "overview": overview_figure,
    }
    return draw_figures(folder, makers, runs, title)


def draw_figures(folder: Path, makers: Mapping[str, Maker], runs: Sequence[Run], title: str) -> list[Path]:
    """Make the figures of these names in the style of the house."""
    paths = []
    for name, make in makers.items():
        with rc_context(STYLE):
            figure = make(runs, title)
            FigureCanvasAgg(figure)
            content = io.BytesIO()
            figure.savefig(content, format="png")
        paths.append(folder / f"{name}.png")
        write_atomically(paths[-1], content.getvalue())
    return paths


def accuracy_figure(runs: Sequence[Run], title: str) -> Figure:
    """Accuracy by epoch on the training and on the test set."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2, sharey=True)
    draw_accuracy(left, runs, "train_accuracy", "Train accuracy")
    draw_accuracy(right, runs, "test_accuracy", "Test accuracy")
    lowest = min(_lowest_accuracy(runs, name) for name in ("train_accuracy", "test_accuracy"))
    left.set_ylim(lowest, 1 + 0.03 * (1 - lowest))
    right.legend(loc="lower right")
    return figure


def loss_figure(runs: Sequence[Run], title: str) -> Figure:
    """Loss by epoch on the training and on the test set."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    figure.suptitle(title)
    for axes, part in zip(figure.subplots(1, 2), ("train", "test"), strict=True):
        draw_curves(axes, runs, f"{part}_loss")
        axes.set(title=f"{part.capitalize()} loss", yscale="log")
    figure.axes[-1].legend(loc="upper right")
    return figure


def collapse_figure(runs: Sequence[Run], title: str) -> Figure:
    """NC1 to NC4 by epoch, on the training set but for NC4, in which only test images differ."""
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, len(COLLAPSE))
    for axes, (name, label) in zip(panels, COLLAPSE.items(), strict=True):
        draw_curves(axes, runs, name)
        axes.set_title(label)
    panels[0].set_yscale("log")
    panels[0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panels[0].minorticks_off()
    for axes in panels[1:]:
        axes.set_ylim(bottom=0)
    panels[3].set_yscale("symlog", linthresh=1e-2)
    panels[3].yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    panels[0].legend(loc="upper right")
    return figure


def cosine_figure(runs: Sequence[Run], title: str) -> Figure:
    """Cosines between class means and between the rows of the frame at the end of training, for each head."""
    shown = one_of_each_head(runs)
    figure = Figure(figsize=(1.2 + 2.3 * len(shown), 5.2), layout="constrained")
    figure.suptitle(f"Cosines, centered, after {int(shown[0].last['epoch'])} epochs: {title}")
    grid = figure.subplots(2, len(shown), squeeze=False)
    for column, run in enumerate(shown):
        for axes, what in zip(grid[:, column], ("class_means", "frame"), strict=True):
            picture = draw_cosines(axes, run.snapshots[f"last_{what}"])
        grid[0, column].set_title(run.head, color=COLOURS[run.head])
    grid[0, 0].set_ylabel("class means")
    grid[1, 0].set_ylabel("frame")
    color_bar(figure, picture, list(grid.flat), len(shown[0].snapshots["last_frame"]))
    return figure


def overview_figure(runs: Sequence[Run], title: str) -> Figure:
    """Test accuracy, distance to the nearest ETF, and the class means of one head before and after."""
    figure = Figure(figsize=(13, 3.9), layout="constrained")
    figure.suptitle(title)
    curves, matrices = figure.subfigures(1, 2, width_ratios=(1.3, 1), wspace=0.03)
    accuracy, distance = curves.subplots(1, 2)
    draw_accuracy(accuracy, runs, "test_accuracy", "Test accuracy")
    accuracy.legend(loc="lower right")
    _draw_distance(distance, runs)

    shown = one_of_each_head(runs)
    run = next((run for run in shown if run.head == "nearest"), shown[0])
    grid = matrices.subplots(1, 2)
    moments = {"first": "at the start", "last": f"after {int(run.last['epoch'])} epochs"}
    for axes, (moment, label) in zip(grid, moments.items(), strict=True):
        picture = draw_cosines(axes, run.snapshots[f"{moment}_class_means"])
        axes.set_xlabel(label)
    matrices.suptitle(f"Cosines of class means, {run.head} head", fontsize=11, fontweight="bold")
    color_bar(matrices, picture, list(grid), len(run.snapshots["last_frame"]))
    return figure


def draw_accuracy(axes: Axes, runs: Sequence[Run], name: str, title: str) -> None:
    draw_curves(axes, runs, name)
    lowest = _lowest_accuracy(runs, name)
    axes.set(title=title, ylim=(lowest, 1 + 0.03 * (1 - lowest)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%")


def _lowest_accuracy(runs: Sequence[Run], name: str) -> float:
    """Where to cut the axis, so that the steep beginning does not squeeze the end into a line."""
    lowest = min(row[name] for run in runs for row in run.history if row["epoch"] >= 0.2 * run.last["epoch"])
    return max(0.0, 1 - 1.3 * (1 - lowest) - 0.005)


def _draw_distance(axes: Axes, runs: Sequence[Run]) -> None:
    draw_curves(axes, runs, "train_nc2_etf_distance_means")
    axes.set(title="Class means to nearest ETF", ylabel="distance")
    axes.set_ylim(bottom=0)


def draw_curves(axes: Axes, runs: Sequence[Run], name: str) -> None:
    """Mean over the seeds of each head by epoch, and a band from the lowest to the highest."""
    for head, color in COLOURS.items():
        curves = [[row.get(name, np.nan) for row in run.history] for run in runs if run.head == head]
        epochs, values = np.arange(len(runs[0].history)), np.asarray(curves)
        if np.isnan(values).all():
            continue
        axes.plot(epochs, values.mean(0), color=color, label=head)
        if len(curves) > 1:
            axes.fill_between(epochs, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)
    axes.set_xlabel("epoch")
    axes.set_xlim(0, runs[0].last["epoch"])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw_cosines(axes: Axes, rows: Tensor) -> AxesImage:
    """The cosines between rows less their mean."""
    axes.grid(False)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return axes.imshow(
        centered_cosines(rows).numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest"
    )


def color_bar(figure: FigureBase, picture: AxesImage, axes: list[Axes], num_classes: int) -> None:
    """A bar with a tick where all cosines of different classes end up in a simplex ETF."""
    bar = figure.colorbar(picture, ax=axes, shrink=0.8, aspect=25, pad=0.03)
    target = -1 / (num_classes - 1)
    bar.set_ticks([-1, target, 1], labels=["−1", f"−1/{num_classes - 1}", "1"])
    bar.outline.set_visible(False)


def one_of_each_head(runs: Sequence[Run]) -> list[Run]:
    first: dict[HeadName, Run] = {}
    for run in runs:
        first.setdefault(run.head, run)
    return list(first.values())
