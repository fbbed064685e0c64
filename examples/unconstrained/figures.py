"""Pictures of a comparison, as PNG files."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from comparison.checkpoints import write_atomically
from comparison.figures import STYLE
from unconstrained.descent import Run
from unconstrained.reporting import DISTANCES
from unconstrained.settings import HeadName

# Colors of Okabe and Ito, which the color-blind can tell apart. Fixed and learned, and the two nearest, may
# coincide: the second of each pair is dashed, so that both are seen.
STYLES: dict[HeadName, tuple[str, str]] = {
    "standard": ("#4D4D4D", "-"),
    "fixed": ("#0072B2", "-"),
    "learned": ("#009E73", "--"),
    "nearest": ("#D55E00", "-"),
    "nearest-detached": ("#E69F00", "--"),
}
MEASURES = {
    "nc1_trace": "NC1: within over between",
    "nc2_gram_means": "NC2: Gram matrix of the means",
    "nc3_distance": "NC3: weight against means",
}


def write_figures(folder: Path, runs: Sequence[Run], suffix: str) -> list[Path]:
    """Write all figures of a comparison and return their paths."""
    paths = []
    for name, make in {"distance": distance_figure, "collapse": collapse_figure}.items():
        with rc_context(STYLE):
            figure = make(runs)
            FigureCanvasAgg(figure)
            content = io.BytesIO()
            figure.savefig(content, format="png", dpi=120)
        paths.append(folder / f"{name}{suffix}.png")
        write_atomically(paths[-1], content.getvalue())
    return paths


def distance_figure(runs: Sequence[Run]) -> Figure:
    """Distance of the class means to their nearest ETF by step, one panel for each K."""
    counts = _counts(runs)
    figure = Figure(figsize=(1.2 + 3.9 * len(counts), 3.6), layout="constrained")
    for axes, count in zip(
        figure.subplots(1, len(counts), sharey=True, squeeze=False).flat, counts, strict=True
    ):
        for distance in DISTANCES:
            axes.axhline(distance, color="#999999", linewidth=0.8, linestyle=":")
        _draw(axes, [run for run in runs if run.key.classes == count], "etf_distance")
        axes.set(title=f"{count} classes", ylim=(1e-3, 1), xlabel="step")
    figure.axes[0].set_ylabel("class means to nearest ETF")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center")
    return figure


def collapse_figure(runs: Sequence[Run]) -> Figure:
    """NC1, NC2 and NC3 by step, one row of panels for each K."""
    counts = _counts(runs)
    # With one sample a class NC1 is zero all along, which a log axis cannot show.
    shown = [name for name in MEASURES if any(row[name] > 0 for run in runs for row in run.history[1:])]
    figure = Figure(figsize=(11, 0.6 + 2.6 * len(counts)), layout="constrained")
    grid = figure.subplots(len(counts), len(shown), squeeze=False, sharex=True)
    for line, count in zip(grid, counts, strict=True):
        for axes, name in zip(line, shown, strict=True):
            _draw(axes, [run for run in runs if run.key.classes == count], name)
            axes.set_ylim(bottom=max(axes.get_ylim()[0], 1e-5))  # below is rounding
        line[0].set_ylabel(f"{count} classes")
    for axes, name in zip(grid[0], shown, strict=True):
        axes.set_title(MEASURES[name])
    for axes in grid[-1]:
        axes.set_xlabel("step")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center")
    return figure


def _counts(runs: Sequence[Run]) -> list[int]:
    return sorted({run.key.classes for run in runs})


def _draw(axes: Axes, runs: Sequence[Run], name: str) -> None:
    """Median over the seeds of each head by step, and a band from the lowest to the highest."""
    for head, (color, dashes) in STYLES.items():
        histories = [run.history[1:] for run in runs if run.key.head == head]  # a log axis has no step 0
        if not histories:
            continue
        steps = [row["step"] for row in histories[0]]
        values = np.asarray([[row[name] for row in history] for history in histories])
        axes.plot(steps, np.median(values, 0), color=color, linestyle=dashes, label=head)
        axes.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)
    axes.set(xscale="log", yscale="log")
    axes.minorticks_off()
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
