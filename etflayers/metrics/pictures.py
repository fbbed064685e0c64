"""Pictures of what the metrics return, for their ``plot``: matplotlib is loaded when one is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from etflayers.checks import require, require_module

__all__ = ["plot_margins", "plot_measures"]

# Below this the scale is linear: collapse is followed over decades, and cosines and margins may be negative.
_LINEAR_BELOW = 1e-3
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


def _axes(ax: Any, *, height: float) -> Any:
    if ax is not None:
        return ax.figure, ax
    pyplot = require_module("matplotlib.pyplot", extra="examples")
    return pyplot.subplots(figsize=(8, height), layout="constrained")
