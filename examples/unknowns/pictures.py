"""What the study of unknown inputs looks like: each point is one seed."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from lab.figures import BLUE, GREEN, GREY, ORANGE, RED, in_percent, new_figure
from lab.files import Row
from lab.results import grouped
from unknowns.networks import ENCODER
from unknowns.scores import SCORES

COLORS = {"plain": GREY, "trained": GREY, "entropy": GREEN, "projector": ORANGE, "both": BLUE}
MARKS = {"encoder": "o", "projector": "^"}


def score_figure(places: Sequence[Row]) -> Figure:
    """AUROC of each score, a panel for each head; points are seeds, colors what the network is made of."""
    heads = grouped(places, "head")
    figure = new_figure(1.6 + 2.4 * len(heads), 4.2)
    panels = figure.subplots(1, len(heads), sharex=True, sharey=True, squeeze=False)[0]
    shown = [score for score in SCORES if any(f"auroc_{score}" in row for row in places)]
    for axes, ((head,), same) in zip(panels, heads.items(), strict=True):
        for place, score in enumerate(shown):
            for row in same:
                if f"auroc_{score}" in row:
                    _point(axes, row, row[f"auroc_{score}"], place + _offset(row))
        axes.set(title=head)
        axes.axvline(0.5, color="#999999", linewidth=0.8)
    panels[0].set_yticks(range(len(shown)), shown)
    panels[0].invert_yaxis()
    figure.supxlabel("AUROC, mean over the kinds of unknown input; 0.5 is chance")
    _legend(figure, panels[0], places)
    return figure


def trade_off_figure(places: Sequence[Row]) -> Figure:
    """Detection and transfer of every place over its NC1: to the left features are more collapsed."""
    figure = new_figure(9, 4)
    panels = figure.subplots(1, 2, sharex=True)
    measures = {"auroc": "AUROC, mean over scores and unknown", "transfer": "accuracy of a linear probe"}
    titles = ("Detection", "Transfer")
    for axes, (measure, label), title in zip(panels, measures.items(), titles, strict=True):
        for row in places:
            _point(axes, row, row["nc1_trace"], row[measure])
        axes.set(title=title, ylabel=label, xscale="log", xlabel="NC1 on the training set")
    in_percent(panels[1])
    _legend(figure, panels[0], places)
    return figure


def _offset(row: Row) -> float:
    """Points of one score are drawn in rows of their own, so that none covers another."""
    order = [(variant, space) for variant in COLORS for space in MARKS]
    return 0.09 * (order.index((row["variant"], row["space"])) - len(order) / 2)


def _point(axes, row: Row, x: float, y: float) -> None:
    label = row["variant"] if row["space"] == ENCODER else f"{row['variant']}, at the projector"
    axes.scatter(
        [x],
        [y],
        s=18,
        color=COLORS.get(row["variant"], RED),
        marker=MARKS[row["space"]],
        alpha=0.75,
        label=label,
    )


def _legend(figure: Figure, axes, places: Sequence[Row]) -> None:
    handles, labels = axes.get_legend_handles_labels()
    first = dict(zip(labels[::-1], handles[::-1], strict=True))
    figure.legend(first.values(), first.keys(), loc="outside lower center", ncols=min(len(first), 6))
