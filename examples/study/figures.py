"""Pictures of a study, as PNG files. Curves are means over the seeds, with a band from lowest to highest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from mpl_toolkits.mplot3d.axes3d import Axes3D
from torch import Tensor

from comparison.figures import (
    COLOURS,
    Maker,
    accuracy_figure,
    cosine_figure,
    draw_curves,
    draw_figures,
    loss_figure,
    one_of_each_head,
)
from comparison.training import Run
from etflayers import nearest_etf, simplex_etf
from study.measures import MEASURES, PARTS, existing

COLLAPSE = (
    "train_nc1_trace",
    "train_nc2_equinorm_means",
    "train_nc2_equiangularity_mean_means",
    "train_nc2_etf_distance_means",
    "train_nc3_distance",
    "train_nc4_disagreement",
    "test_nc4_disagreement",
    "train_margin_mean",
)
ETF_DISTANCES = (
    "train_nc2_etf_distance_means",
    "train_nc2_etf_distance_weights",
    "train_nc3_etf_distance",
    "train_nc2_etf_drift_means",
)
CLASS_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
DECADES = (
    4  # the depth of a logarithmic axis: below are rounding errors of heads that are ETFs by construction
)


def write_figures(folder: Path, runs: Sequence[Run], title: str) -> list[Path]:
    """Write all figures of a study and return their paths."""
    makers: dict[str, Maker] = {
        "collapse": partial(measure_figure, COLLAPSE, 4),
        "measures": partial(measure_figure, _all_of("train"), 5),
        "measures_test": partial(measure_figure, _all_of("test"), 5),
        "etf_distances": partial(measure_figure, ETF_DISTANCES, 4),
        "margins": margin_figure,
        "cosines": cosine_figure,
        "accuracy": accuracy_figure,
        "loss": loss_figure,
    }
    if _num_classes(runs) == 4:
        makers["class_means_3d"] = tetrahedron_figure
    return draw_figures(folder, makers, runs, title)


def measure_figure(names: Sequence[str], columns: int, runs: Sequence[Run], title: str) -> Figure:
    """A panel by epoch for each of the named measures that some run has."""
    shown = [name for name in names if any(name in existing(run.last) for run in runs)]
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(2.9 * columns, 0.9 + 2.3 * rows), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    for axes, name in zip(panels, shown, strict=False):
        _draw_measure(axes, runs, name)
    for above in panels[: len(shown) - columns]:
        above.set_xlabel("")
    for lowest in panels[max(len(shown) - columns, 0) : len(shown)]:
        lowest.tick_params(labelbottom=True)
    for unused in panels[len(shown) :]:
        unused.remove()
    _legend(figure, runs)
    return figure


def margin_figure(runs: Sequence[Run], title: str) -> Figure:
    """The curves P_CM: the cosine margins of all samples in ascending order."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    figure.suptitle(title)
    train, test = figure.subplots(1, 2, sharey=True)
    _draw_margins(train, runs, "first_train_margins", linestyle="dotted")
    _draw_margins(train, runs, "last_train_margins")
    _draw_margins(test, runs, "last_test_margins")
    train.set(title="Train, before (dotted) and after training", ylabel="cosine margin")
    test.set(title="Test, after training")
    _legend(figure, runs)
    return figure


def tetrahedron_figure(runs: Sequence[Run], title: str) -> Figure:
    """Four class means and four classifier rows in space, before and after training, for each head.

    They are seen in the span of the centered class means, turned such that the nearest simplex ETF is the
    same regular tetrahedron in every panel.
    """
    shown = one_of_each_head(runs)
    figure = Figure(figsize=(0.6 + 2.2 * len(shown), 4.6), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(2, len(shown), squeeze=False, subplot_kw={"projection": "3d"})
    for column, run in enumerate(shown):
        for axes, moment in zip(grid[:, column], ("first", "last"), strict=True):
            _draw_tetrahedron(axes, run, moment)
        grid[0, column].set_title(run.head, color=COLOURS[run.head])
    for axes, label in zip(grid[:, 0], ("before", "after"), strict=True):
        axes.text2D(-0.05, 0.5, label, transform=axes.transAxes, rotation=90, va="center", ha="right")
    marks = [
        Line2D([], [], color="#4D4D4D", marker="o", linestyle="none", label="class mean"),
        Line2D([], [], color="#4D4D4D", marker="^", markerfacecolor="none", label="classifier row"),
        Line2D([], [], color="#BBBBBB", linewidth=1, label="nearest simplex ETF"),
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=3)
    return figure


def _all_of(part: str) -> list[str]:
    return [f"{part}_{name}" for name in MEASURES if name not in ("accuracy", "loss")]


def _num_classes(runs: Sequence[Run]) -> int:
    return len(runs[0].snapshots["last_frame"])


def _draw_measure(axes: Axes, runs: Sequence[Run], name: str) -> None:
    part, _, measure = name.partition("_")
    draw_curves(axes, runs, name)
    axes.set_title(f"{MEASURES[measure].label}\n{PARTS[part]}", fontsize=9, pad=5)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
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
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()


def _draw_margins(axes: Axes, runs: Sequence[Run], snapshot: str, linestyle: str = "solid") -> None:
    for head, color in COLOURS.items():
        curves = [run.snapshots[snapshot].numpy() for run in runs if run.head == head]
        if not curves:
            continue
        values = np.stack(curves)
        share = (np.arange(values.shape[1]) + 0.5) / values.shape[1]
        axes.plot(share, values.mean(0), color=color, linestyle=linestyle)
        axes.fill_between(share, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)
    axes.axhline(0, color="#999999", linewidth=0.8)
    axes.set(xlim=(0, 1), xlabel="share of the samples", xticks=(0, 0.25, 0.5, 0.75))


def tetrahedron_basis(means: Tensor) -> Tensor:
    """Orthonormal basis ``(d, 3)`` of the span of four centered class means ``(4, d)``.

    It takes their nearest simplex ETF W* to the tetrahedron T = simplex_etf(4, 3). Both have the Gram matrix
    c^2 (I - 11'/4) with c^2 = 4/3, so B = W*' T / c^2 has orthonormal columns, and W* B = T.
    """
    return nearest_etf(means).mT @ simplex_etf(4, 3, dtype=means.dtype) * (3 / 4)


def _draw_tetrahedron(axes: Axes3D, run: Run, moment: str) -> None:
    means, frame = (run.snapshots[f"{moment}_{what}"].double() for what in ("class_means", "frame"))
    basis, center = tetrahedron_basis(means), means.mean(0)
    means, frame = means - center, frame - frame.mean(0)
    size = _root_mean_square(means)
    for edge in combinations(simplex_etf(4, 3), 2):
        axes.plot(*torch.stack(edge, 1), color="#BBBBBB", linewidth=1)
    if moment == "last" and "last_features" in run.snapshots:
        points = (run.snapshots["last_features"].double() - center) @ basis / size
        colors = [CLASS_COLOURS[y] for y in run.snapshots["last_features_targets"]]
        axes.scatter(*points.T, c=colors, s=5, alpha=0.4, linewidths=0, depthshade=False)
    rows = frame @ basis / _root_mean_square(frame)
    for mean, row, color in zip(means @ basis / size, rows, CLASS_COLOURS, strict=True):
        axes.plot(*mean.unsqueeze(1), color=color, marker="o", markersize=6)
        axes.plot(*torch.stack([torch.zeros(3), row], 1), color=color, linewidth=1)
        axes.plot(*row.unsqueeze(1), color=color, marker="^", markersize=8, markerfacecolor="none")
    axes.set_axis_off()
    axes.set(xlim=(-1, 1), ylim=(-1, 1), zlim=(-1, 1))
    axes.set_box_aspect((1, 1, 1), zoom=1.3)
    axes.view_init(elev=20, azim=-22)


def _root_mean_square(rows: Tensor) -> Tensor:
    """Of the lengths of the rows."""
    return rows.square().sum(1).mean().sqrt()


def _legend(figure: Figure, runs: Sequence[Run]) -> None:
    """One legend below all panels, where it covers no curve."""
    heads = {run.head for run in runs}
    lines = [Line2D([], [], color=color, label=head) for head, color in COLOURS.items() if head in heads]
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines))
