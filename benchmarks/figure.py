"""The picture of the scaling suite: time against K and against d, with the floor drawn in."""

from __future__ import annotations

from pathlib import Path

from benchmarks.report import Report
from etflayers.checks import require_module

__all__ = ["draw_scaling"]

_LABELS = {"K": "number of classes K   (d = 512)", "d": "number of features d   (K = 100)"}
_STYLES = [("#1b6ca8", "o", "-"), ("#c2571a", "s", "-"), ("#777777", "", "--")]


def draw_scaling(report: Report, path: Path) -> None:
    """Write a PNG of the tables of the scaling suite, one for each axis."""
    require_module("matplotlib", extra="examples").use("Agg")
    plt = require_module("matplotlib.pyplot", extra="examples")
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for panel, (axis, label), table in zip(panels, _LABELS.items(), report.tables, strict=True):
        shapes, *curves = zip(*table.rows, strict=True)
        sizes = [int(shape.strip("()").split(", ")[axis == "K"]) for shape in shapes]
        for name, times, (color, marker, line) in zip(table.columns[1:], curves, _STYLES, strict=True):
            panel.loglog(sizes, [float(time) for time in times], line, color=color, marker=marker, label=name)
        panel.set_xlabel(label)
        panel.set_xticks(sizes, [str(size) for size in sizes])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("forward + backward (ms)")
    panels[0].legend(frameon=False)
    figure.suptitle("Nearest simplex ETF, float32, one thread")
    figure.savefig(path, dpi=130)
    plt.close(figure)
