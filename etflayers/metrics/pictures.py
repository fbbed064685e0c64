"""Pictures of what is measured, such as by ``plot`` of a metric: matplotlib is loaded when one is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from etflayers.checks import require, require_module
from etflayers.functional import nearest_etf
from etflayers.geometry import simplex_etf
from etflayers.metrics.margins import row_cosines
from etflayers.metrics.nc2 import require_rows

__all__ = ["plot_cosines", "plot_margins", "plot_measures", "plot_tetrahedron"]

# Below this the scale is linear: collapse is followed over decades, and cosines and margins may be negative.
_LINEAR_BELOW = 1e-3
# Blue, red, green and pink of Okabe and Ito, which the color-blind can tell apart.
_CLASS_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_FAMILIES = ("nc1", "nc2", "nc3", "nc4")


def plot_measures(values: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]], ax: Any = None) -> Any:
    """Bars of the measures by name or, of several dictionaries, a curve of each measure over their number.

    Args:
        values: what ``compute`` returned, once or from epoch to epoch.
        ax: axes of matplotlib to draw into; default: a new figure.

    Returns:
        The figure and the axes.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        InvalidArgumentError: nothing to draw.
    """
    several = not isinstance(values, Mapping)
    results = [values] if isinstance(values, Mapping) else list(values)
    steps = [{name: float(value) for name, value in result.items()} for result in results]
    names = list(dict.fromkeys(name for step in steps for name in step))
    require(bool(names), "val must hold at least one measure: pass what compute returned")
    figure, ax = _axes(ax, height=6 if several else 1.5 + 0.22 * len(names))
    if several:
        for number, name in enumerate(names):
            style = ("-", "--", ":", "-.")[number // 10 % 4]
            points = [(i, step[name]) for i, step in enumerate(steps) if name in step]
            ax.plot(*zip(*points, strict=True), style, marker=".", color=f"C{number % 10}", label=name)
        ax.set_yscale("symlog", linthresh=_LINEAR_BELOW)
        ax.set_xlabel("number of the measurement")
        ax.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    else:
        family = [next((i for i, f in enumerate(_FAMILIES) if name.startswith(f)), 4) for name in names]
        lengths = [steps[0][name] for name in names]
        bars = ax.barh(names, lengths, color=[f"C{i}" for i in family])
        ax.bar_label(bars, labels=[f"{length:.3g}" for length in lengths], padding=2, fontsize="x-small")
        ax.invert_yaxis()
        ax.margins(x=0.15)
        ax.set_xscale("symlog", linthresh=_LINEAR_BELOW)
        ax.tick_params(axis="y", labelsize="small")
    return figure, ax


def plot_margins(values: Tensor | Sequence[Tensor], ax: Any = None) -> Any:
    """The curve P_CM: margins in ascending order over the share of the samples, a curve for each tensor.

    Args:
        values: sorted margins ``(N,)``, once or from epoch to epoch.
        ax: axes of matplotlib to draw into; default: a new figure.

    Returns:
        The figure and the axes.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        InvalidArgumentError: nothing to draw.
    """
    curves = [values] if isinstance(values, Tensor) else list(values)
    require(bool(curves), "val must hold at least one curve: pass what compute returned")
    figure, ax = _axes(ax, height=4)
    for number, margins in enumerate(curves):
        heights = margins.detach().cpu().numpy()
        share = [(i + 0.5) / len(heights) for i in range(len(heights))]
        ax.plot(share, heights, label=str(number))
    ax.axhline(0, color="gray", linewidth=0.5)
    ax.set_xlabel("share of the samples")
    ax.set_ylabel("cosine margin")
    if len(curves) > 1:
        ax.legend(title="number of the measurement")
    return figure, ax


def plot_cosines(rows: Tensor, ax: Any = None) -> Any:
    r"""Cosines between vectors less their mean, ``cos(x_i - m, x_j - m)``, as a matrix of colors.

    Of class means or of the rows of a classifier: at collapse every entry off the diagonal has the color of
    -1/(K-1), which the bar marks.

    Args:
        rows: X, ``(K, d)`` with K >= 2, such as ``metric.statistics().means`` or ``head.weight``.
        ax: axes of matplotlib to draw into, without a bar; default: a new figure, with one.

    Returns:
        The figure and the axes.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        InvalidArgumentError: rows of another shape or dtype.
    """
    require_rows("rows", rows)
    centered = rows.detach().double().cpu()
    centered = centered - centered.mean(0)
    alone = ax is None
    figure, ax = _axes(ax, height=6)
    options = {"cmap": "RdBu_r", "vmin": -1, "vmax": 1, "interpolation": "nearest"}
    image = ax.imshow(row_cosines(centered, centered).numpy(), **options)
    ax.grid(False)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    if alone:
        target = -1 / (len(rows) - 1)
        figure.colorbar(image, ax=ax).set_ticks([-1, target, 1], labels=["−1", f"−1/{len(rows) - 1}", "1"])
    return figure, ax


@torch.no_grad()
def plot_tetrahedron(
    means: Tensor,
    weight: Tensor | None = None,
    *,
    features: Tensor | None = None,
    targets: Tensor | None = None,
    ax: Any = None,
) -> Any:
    r"""Four class means in space: a regular tetrahedron at collapse, with the classifier rows at its corners.

    They are seen in the span of the centered means, turned such that their nearest simplex ETF W* is the
    tetrahedron T = ``simplex_etf(4, 3)``, the same in every picture. Both have the Gram matrix
    ``c^2 (I - 11'/4)`` with c^2 = 4/3, so ``B = W*' T / c^2`` has orthonormal columns, and ``W* B = T``.

    Args:
        means: M, ``(4, d)`` with d >= 3: dots, scaled to a root mean square length of 1.
        weight: W, ``(4, d)``, centered and scaled likewise: arrows with a triangle at the end.
        features: h, ``(N, d)``, on the scale of the means: small points.
        targets: y, ``(N,)``, their classes, in [0, 4).
        ax: axes of matplotlib with the projection "3d"; default: a new figure.

    Returns:
        The figure and the axes.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        InvalidArgumentError: another number of classes, shapes that do not fit, features without targets.
    """
    for name, rows in {"means": means, "weight": means if weight is None else weight}.items():
        require_rows(name, rows)
        require(
            rows.shape == (4, means.shape[1]) and rows.shape[1] >= 3,
            f"{name} must have shape (4, d) with d >= 3, as four classes span three dimensions, "
            f"got {tuple(rows.shape)}",
        )
    require((features is None) == (targets is None), "features and targets belong together: give both")
    if ax is None:
        pyplot = require_module("matplotlib.pyplot", extra="examples")
        _, ax = pyplot.subplots(figsize=(6, 6), layout="constrained", subplot_kw={"projection": "3d"})
    means, corners = means.double().cpu(), simplex_etf(4, 3, dtype=torch.float64)
    basis, center = nearest_etf(means).mT @ corners * (3 / 4), means.mean(0)
    size = (means - center).norm() / 2  # of four rows with a root mean square length of 1 the norm is 2
    for edge in combinations(corners, 2):
        ax.plot(*torch.stack(edge, 1), color="#BBBBBB", linewidth=1)
    if features is not None and targets is not None:
        points = (features.double().cpu() - center) @ basis / size
        colors = [_CLASS_COLORS[int(target)] for target in targets]
        ax.scatter(*points.T, c=colors, s=5, alpha=0.4, linewidths=0, depthshade=False)
    for mean, color in zip((means - center) @ basis / size, _CLASS_COLORS, strict=True):
        ax.plot(*mean.unsqueeze(1), color=color, marker="o", markersize=6)
    if weight is not None:
        rows = weight.double().cpu() - weight.double().cpu().mean(0)
        for row, color in zip(2 * rows @ basis / rows.norm(), _CLASS_COLORS, strict=True):
            ax.plot(*torch.stack([torch.zeros(3), row], 1), color=color, linewidth=1)
            ax.plot(*row.unsqueeze(1), color=color, marker="^", markersize=8, markerfacecolor="none")
    ax.set_axis_off()
    ax.set(xlim=(-1, 1), ylim=(-1, 1), zlim=(-1, 1))
    ax.set_box_aspect((1, 1, 1), zoom=1.3)
    ax.view_init(elev=20, azim=-22)
    return ax.figure, ax


def _axes(ax: Any, *, height: float) -> Any:
    if ax is not None:
        return ax.figure, ax
    pyplot = require_module("matplotlib.pyplot", extra="examples")
    return pyplot.subplots(figsize=(8, height), layout="constrained")
