"""Pictures of a study of learned images, as PNG files."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from comparison.checkpoints import write_atomically
from comparison.figures import STYLE
from distillation.images.report import SeedResult

# Colors of Okabe and Ito, which the color-blind can tell apart; what was learned is drawn in solid lines.
COLOURS: dict[str, tuple[str, str]] = {
    "distilled": ("#D55E00", "-"),
    "distilled, other order": ("#E69F00", "-"),
    "distilled, other batches": ("#009E73", "-"),
    "distilled, fresh networks": ("#CC79A7", "-"),
    "random real images": ("#56B4E9", "--"),
    "k-means centers": ("#0072B2", "--"),
    "average images": ("#4D4D4D", "--"),
}
Maker = Callable[[Sequence[SeedResult], str, str], Figure]


def write_figures(folder: Path, results: Sequence[SeedResult], measure: str, title: str) -> list[Path]:
    """Write all figures of a study and return their paths."""
    return draw(folder, {"steps": steps_figure, "learning": learning_figure}, results, measure, title)


def draw(
    folder: Path, makers: Mapping[str, Maker], results: Sequence[SeedResult], measure: str, title: str
) -> list[Path]:
    """Make the figures of these names in the style of the house."""
    paths = []
    for name, make in makers.items():
        with rc_context(STYLE):
            figure = make(results, measure, title)
            FigureCanvasAgg(figure)
            content = io.BytesIO()
            figure.savefig(content, format="png", dpi=120)
        paths.append(folder / f"{name}.png")
        write_atomically(paths[-1], content.getvalue())
    return paths


def steps_figure(results: Sequence[SeedResult], measure: str, title: str) -> Figure:
    """The measure on test images by training steps: mean and deviation over networks and seeds."""
    figure = Figure(figsize=(7.5, 4), layout="constrained")
    axes = figure.subplots()
    for training, (color, dashes) in COLOURS.items():
        curves = [
            curve
            for result in results
            for o in result.outcomes
            if o.training == training
            for curve in o.curves
        ]
        if not curves:
            continue
        steps = [step for step, _ in curves[0]]
        values = np.asarray([[measures[measure] for _, measures in curve] for curve in curves])
        mean, deviation = values.mean(0), values.std(0)
        axes.plot(steps, mean, color=color, linestyle=dashes, label=training)
        axes.fill_between(steps, mean - deviation, mean + deviation, color=color, alpha=0.15, linewidth=0)
    axes.set(title=f"Trained on a few images, tested on {title}", xlabel="training step", ylim=(0, 1))
    axes.set_ylabel(f"test {measure}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _in_percent(axes)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    return figure


def learning_figure(results: Sequence[SeedResult], measure: str, title: str) -> Figure:
    """Outer loss and measure on training batches, and the norm of the hypergradient, by outer step."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    figure.suptitle(f"Learning the images of {title}")
    panels = {
        "loss": "outer loss",
        measure: f"{measure}, training batches",
        "gradient_norm": "hypergradient norm",
    }
    for axes, (name, label) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for result in results:
            history = result.learned.history
            values = _smoothed(np.asarray([row[name] for row in history]))
            axes.plot([row["step"] for row in history], values, label=f"seed {result.seed}")
        axes.set(title=label, xlabel="outer step")
        if name == measure:
            _in_percent(axes)
        elif name == "gradient_norm":
            axes.set_yscale("log")
    figure.axes[0].legend()
    return figure


def _smoothed(values: np.ndarray, width: int = 15) -> np.ndarray:
    """A running mean, over what there is near the ends and where a batch had something to measure."""
    width = max(1, min(width, len(values) // 4))
    known = np.isfinite(values)
    kernel = np.ones(width)
    total = np.convolve(np.where(known, values, 0), kernel, mode="same")
    count = np.convolve(known.astype(float), kernel, mode="same")
    return total / np.maximum(count, 1)


def _in_percent(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%")
