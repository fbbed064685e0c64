"""What the study of unknown inputs looks like: each point is one seed."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from lab.figures import BLUE, GREEN, GREY, ORANGE, in_percent, new_figure
from lab.files import Row
from lab.results import grouped
from unknowns.networks import ENCODER, PROJECTOR
from unknowns.scores import SCORES

Kind = tuple[str, str]  # variant and space
COLORS = {"plain": GREY, "trained": GREY, "entropy": GREEN, "projector": ORANGE, "both": BLUE}
MARKS = {ENCODER: "o", PROJECTOR: "^"}
ROW = 0.8  # of the distance of two scores, for the points of one


def score_figure(places: Sequence[Row]) -> Figure:
    """AUROC of each score, a panel for each head; points are seeds, colors what the network is made of."""
    heads, kinds = grouped(places, "head"), kinds_of(places)
    shown = [score for score in SCORES if any(f"auroc_{score}" in row for row in places)]
    title = "AUROC of each score, mean over the kinds of unknown input (0.5 is chance)"
    figure = new_figure(1.6 + 2.3 * len(heads), 1.6 + 0.5 * len(shown), title)
    panels = figure.subplots(1, len(heads), sharex=True, sharey=True, squeeze=False)[0]
    for axes, ((head,), same) in zip(panels, heads.items(), strict=True):
        for place, score in enumerate(shown):
            for row in same:
                if f"auroc_{score}" in row:  # each kind in a row of its own, so that none covers another
                    shift = ROW * ((kinds.index(kind_of(row)) + 0.5) / len(kinds) - 0.5)
                    _point(axes, row, row[f"auroc_{score}"], place + shift)
        axes.set(title=head, xlabel="AUROC")
        axes.grid(visible=False, axis="y")
        for border in range(1, len(shown)):
            axes.axhline(border - 0.5, color="#E6E6E6", linewidth=0.8)
    panels[0].set_yticks(range(len(shown)), shown)
    panels[0].invert_yaxis()
    _legend(figure, kinds)
    return figure


def trade_off_figure(places: Sequence[Row]) -> Figure:
    """Detection and transfer of every place over its NC1: to the left features are more collapsed."""
    figure = new_figure(9, 4.4)
    panels = figure.subplots(1, 2, sharex=True)
    measures = {"auroc": "AUROC, mean over scores and unknown", "transfer": "accuracy of a linear probe"}
    for axes, (measure, label) in zip(panels, measures.items(), strict=True):
        for row in places:
            _point(axes, row, row["nc1_trace"], row[measure])
        axes.set(ylabel=label, xscale="log", xlabel="NC1 on the training set")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.minorticks_off()
    panels[0].set_title("Detection")
    panels[1].set_title("Transfer")
    in_percent(panels[1])
    _legend(figure, kinds_of(places))
    return figure


def kind_of(row: Row) -> Kind:
    return row["variant"], row["space"]


def kinds_of(places: Sequence[Row]) -> list[Kind]:
    """Those that occur, always in one order."""
    seen = {kind_of(row) for row in places}
    return [(variant, space) for variant in COLORS for space in MARKS if (variant, space) in seen]


def _point(axes: Axes, row: Row, x: float, y: float) -> None:
    variant, space = kind_of(row)
    axes.scatter([x], [y], s=16, color=COLORS[variant], marker=MARKS[space], alpha=0.75, linewidth=0)


def _legend(figure: Figure, kinds: Sequence[Kind]) -> None:
    handles = [
        figure.axes[0].scatter([], [], s=30, color=COLORS[variant], marker=MARKS[space])
        for variant, space in kinds
    ]
    labels = [f"{variant}, {space}" for variant, space in kinds]
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
