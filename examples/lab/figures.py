"""Pictures in one style, as PNG files."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lab.files import write_atomically

# Colors of Okabe and Ito, which the color-blind can tell apart.
GREY, SKY, BLUE, RED = "#4D4D4D", "#56B4E9", "#0072B2", "#D55E00"
ORANGE, GREEN, PINK = "#E69F00", "#009E73", "#CC79A7"
PALETTE = (GREY, RED, BLUE, GREEN, PINK, ORANGE, SKY)
HEAD_COLORS = {
    "linear": GREY,
    "standard": SKY,
    "fixed": BLUE,
    "nearest": RED,
    "nearest-detached": ORANGE,
    "learned": GREEN,
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


def write_figure(path: Path, make: Callable[[], Figure]) -> Path:
    """Make a figure in the style of the house and write it as PNG."""
    with rc_context(STYLE):
        figure = make()
        FigureCanvasAgg(figure)
        content = io.BytesIO()
        figure.savefig(content, format="png")
    return write_atomically(path, content.getvalue())


def new_figure(width: float, height: float, title: str | None = None) -> Figure:
    """An empty figure, in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    if title is not None:
        figure.suptitle(title)
    return figure


def draw_band(
    axes: Axes,
    x: Sequence[float] | np.ndarray,
    curves: Any,
    *,
    middle: Callable[..., Any] = np.mean,
    **options: Any,
) -> None:
    """The middle of curves ``(runs, points)`` as a line, and a band from the lowest to the highest."""
    values = np.asarray(curves, dtype=float)
    if np.isnan(values).all():
        return
    (line,) = axes.plot(x, middle(values, 0), **options)
    if len(values) > 1:
        axes.fill_between(x, values.min(0), values.max(0), color=line.get_color(), alpha=0.15, linewidth=0)


def in_percent(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%")


def in_plain_numbers(axes: Axes) -> None:
    """1e-2 as 0.01, and no marks between the decades."""
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def legend_below(figure: Figure, axes: Axes, columns: int = 2) -> None:
    """One legend below all panels, where it covers no curve."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns)


def legend_of_heads(figure: Figure, heads: Iterable[str]) -> None:
    """One legend below all panels."""
    shown = set(heads)
    lines = [Line2D([], [], color=color, label=head) for head, color in HEAD_COLORS.items() if head in shown]
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines))


def legend_beside(figure: Figure, axes: Axes) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
