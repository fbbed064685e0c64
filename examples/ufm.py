"""Compare classifier heads on the unconstrained-features model, and check its theory.

    python examples/ufm.py --lr-grid 0.01 0.1 1    all heads, K = 10 and 100: steps until the means are an ETF
    python examples/ufm.py --sweep                 the options of the nearest head, one at a time
    python examples/ufm.py --theory                the landscape against convex optimization
    python examples/ufm.py --resume                continue what was killed
    python examples/ufm.py --help                  everything else

The output folder gets every measured step of every run (runs.csv), medians over the seeds (summary.json),
figures (.png) and checkpoints.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from statistics import median
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from etflayers.metrics import Classifier, class_statistics, collapse_measures
from etflayers.unconstrained import Landscape, convex_optimum, minimize
from lab.figures import HEAD_COLORS, draw_band, in_plain_numbers, legend_beside, new_figure
from lab.files import Row
from lab.heads import HeadName
from lab.options import command
from lab.progress import make_console
from lab.results import Results, make_table
from unconstrained.descent import Descent, RunKey, Settings

DISTANCES = (0.05, 0.01)  # of the class means to their nearest ETF
STEPS = {distance: f"steps_to_{distance:g}" for distance in DISTANCES}
RIVALS = ("fixed", "standard")
PANELS = {
    "nc1_trace": "NC1: within over between",
    "nc2_gram_means": "NC2: Gram matrix of the means",
    "nc3_distance": "NC3: weight against means",
}
# Fixed and learned, and the two nearest, may coincide: the second of each pair is dashed and drawn later.
DASHED = ("learned", "nearest-detached")

# One change at a time of what the nearest head is asked for; the empty one is the starting point.
SWEEP: dict[str, dict[str, Any]] = {
    "as given": {},
    "detached frame": {},
    "momentum 0.02": {"momentum": 0.02},
    "momentum 0.5": {"momentum": 0.5},
    "momentum 1": {"momentum": 1.0},
    "momentum None": {"momentum": None},
    "proximity 0": {"proximity": 0.0},
    "proximity 0.1": {"proximity": 0.1},
    "proximity 1": {"proximity": 1.0},
    "no center": {"center": False},
    "scale 2.5": {"scale": 2.5},
    "scale 10": {"scale": 10.0},
}


def compare(settings: Settings, console: Console) -> list[Descent]:
    """Descend with every head for every number of classes and seed; write tables and figures."""
    results = Results(settings.folder, console)
    runs: dict[RunKey, Descent] = {}

    def run(key: RunKey) -> Descent:
        if key not in runs:
            runs[key] = _descend_and_tell(key, settings, console)
        return runs[key]

    common = dict.fromkeys(settings.heads, settings.lr)
    comparisons = {"common": [run(key) for key in _keys(settings, common, settings.classes)]}
    if settings.lr_grid:
        comparisons["selected"] = []
        for classes in settings.classes:
            rates = {}
            for head in settings.heads:
                tried = [run(RunKey(classes, head, lr, settings.seeds[0])) for lr in settings.lr_grid]
                rates[head] = min(tried, key=_slowness).key.lr
            comparisons["selected"] += [run(key) for key in _keys(settings, rates, (classes,))]

    results.csv("runs", [{**run.key._asdict(), **row} for run in runs.values() for row in run.history])
    summaries = {}
    for rate, compared in comparisons.items():
        summaries[rate] = summary_rows(compared)
        for classes in settings.classes:
            rows = [row for row in summaries[rate] if row["classes"] == classes]
            title = f"Steps until the means are an ETF, {classes} classes, {rate} learning rate"
            console.print(summary_table(rows, title))
        makers = {"distance": distance_figure, "collapse": collapse_figure}
        results.figures({f"{name}-{rate}": partial(make, compared) for name, make in makers.items()})
    results.json("summary", {"settings": settings.fingerprint(), **summaries})
    results.tell()
    return list(runs.values())


def sweep(settings: Settings, console: Console) -> list[Row]:
    """Change the options of the nearest head one at a time."""
    results, table = Results(settings.folder, console), []
    for classes in settings.classes:
        rows = []
        for label, change in SWEEP.items():
            head: HeadName = "nearest-detached" if label == "detached frame" else "nearest"
            changed = replace(settings, **change, out=settings.folder / label.replace(" ", "-"))
            keys = _keys(settings, {head: settings.lr}, (classes,))
            (row,) = summary_rows([_descend_and_tell(key, changed, console, label) for key in keys])
            rows.append({"options": label, **row})
        console.print(summary_table(rows, f"Steps of the nearest head, {classes} classes"))
        table += rows
    results.json("sweep", {"settings": settings.fingerprint(), "sweep": table})
    results.tell()
    return table


def check_theory(settings: Settings, console: Console) -> list[Row]:
    """The landscape of the regularized model, for both losses."""
    results = Results(settings.folder, console)
    rows = [row for loss in ("ce", "mse") for row in landscape_rows(Landscape(loss=loss), settings.seeds)]
    columns = {
        "value": ("value", ".6f"),
        "gap": ("gap", ".1e"),
        "gradient": ("gradient_norm", ".0e"),
        "least\neigenvalue": ("least_eigenvalue", ".1e"),
        "pre-\ndicted": ("predicted_eigenvalue", ".1e"),
        "NC1-3": ("collapse", ".0e"),
    }
    names = ("loss", "rank", "seed")
    table = make_table("Critical points of the regularized model", names, columns)
    for row in rows:
        cells = ("" if row[name] is None else f"{row[name]:{digits}}" for name, digits in columns.values())
        table.add_row(*(str(row[name]) for name in names), *cells)
    console.print(table)
    results.csv("theory", rows)
    results.tell()
    return rows


def landscape_rows(landscape: Landscape, seeds: Sequence[int]) -> list[Row]:
    """One row for each minimum from a random start, and for a critical point of each lower rank.

    ``gap`` is the value above the optimum of the convex program. Rank K - 1 is that of the minimum.
    """
    optimum = convex_optimum(landscape)
    starts: list[tuple[int | None, int]] = [(None, seed) for seed in seeds]
    starts += [(rank, seeds[0]) for rank in range(landscape.num_classes - 1)]
    rows = []
    for rank, seed in starts:
        point = minimize(landscape, rank=rank, generator=torch.Generator().manual_seed(seed))
        value = float(landscape.value(point))
        rows.append(
            {
                "loss": landscape.loss,
                "rank": "free" if rank is None else rank,
                "seed": seed,
                "value": value,
                "convex_optimum": optimum,
                "gap": value - optimum,
                "gradient_norm": landscape.gradient_norm(point),
                "least_eigenvalue": landscape.least_eigenvalue(point),
                "predicted_eigenvalue": landscape.unused_curvature(point),
                "collapse": _distance_from_collapse(landscape, point) if rank is None else None,
            }
        )
    return rows


def _distance_from_collapse(landscape: Landscape, vector: Tensor) -> float:
    weight, features, bias = landscape.unflatten(vector)
    statistics = class_statistics(features.mT, landscape.targets, landscape.num_classes)
    measures = collapse_measures(statistics, Classifier(weight, bias))
    names = ("nc1_trace", "nc2_gram_means", "nc2_gram_weights", "nc3_distance")
    return max(measures[name].item() for name in names)


def _keys(settings: Settings, rates: dict[HeadName, float], classes: Sequence[int]) -> list[RunKey]:
    grid = product(classes, rates.items(), settings.seeds)
    return [RunKey(count, head, lr, seed) for count, (head, lr), seed in grid]


def _slowness(run: Descent) -> tuple[float, float]:
    return run.steps_to(DISTANCES[-1]), run.history[-1]["etf_distance"]


def _descend_and_tell(key: RunKey, settings: Settings, console: Console, label: str = "") -> Descent:
    run = Descent(key, settings)
    run.finish(settings.checkpoint(key.name), resume=settings.resume, every=settings.checkpoint_every)
    steps = {distance: run.steps_to(distance) for distance in DISTANCES}
    reached = (f"{d:g} {'never' if step == math.inf else f'after {step}'}" for d, step in steps.items())
    text = f"{key.name} {label}: distance {', '.join(reached)}, {run.seconds:.1f} s"
    console.print(text, highlight=False, soft_wrap=True)
    return run


def summary_rows(runs: Sequence[Descent]) -> list[Row]:
    """For each K and head the median, lowest and highest number of steps over the seeds; infinite: never.

    ``over_fixed`` and ``over_standard`` are ratios of medians, there if both heads have got so far.
    """
    rows: list[Row] = []
    for classes, head in dict.fromkeys((run.key.classes, run.key.head) for run in runs):
        same = [run for run in runs if (run.key.classes, run.key.head) == (classes, head)]
        row: Row = {"classes": classes, "head": head, "lr": same[0].key.lr, "seeds": len(same)}
        for distance, name in STEPS.items():
            steps = [run.steps_to(distance) for run in same]
            row |= {name: median(steps), f"{name}_min": min(steps), f"{name}_max": max(steps)}
        for name in ("loss", "accuracy", "etf_distance", "nc1_trace", "nc3_distance", "margin"):
            row[f"last_{name}"] = median(run.history[-1][name] for run in same)
        row["ms_per_step"] = median(1000 * run.seconds / run.settings.steps for run in same)
        rows.append(row)
    of = {(row["classes"], row["head"]): row for row in rows}
    for row in rows:
        for rival, name in product(RIVALS, STEPS.values()):
            rivals = of.get((row["classes"], rival), {}).get(name, math.inf)
            known = 0 < rivals < math.inf and row[name] < math.inf
            row[f"{name}_over_{rival}"] = row[name] / rivals if known else None
    return rows


def summary_table(rows: Sequence[Row], title: str) -> Table:
    """The rows of :func:`summary_rows` for reading: median, lowest-highest, and the ratios of medians."""
    named = "options" if "options" in rows[0] else "head"
    rivals = [rival for rival in RIVALS if any(row["head"] == rival for row in rows)]
    ratios = [f"over\n{rival}" for rival in rivals]
    headings = [heading for distance in DISTANCES for heading in (f"to {distance:g}", *ratios)]
    table = make_table(title, [named], ["lr", *headings])
    for row in rows:
        cells = [row[named], f"{row['lr']:g}"]
        for name in STEPS.values():
            ends = (row[f"{name}{end}"] for end in ("", "_min", "_max"))
            middle, low, high = ("never" if math.isinf(count) else f"{count:g}" for count in ends)
            cells.append(middle if low == high else f"{middle} {low}-{high}")
            over = (row[f"{name}_over_{rival}"] for rival in rivals)
            cells += ["" if ratio is None else f"{ratio:.2f}" for ratio in over]
        table.add_row(*cells)
    return table


def distance_figure(runs: Sequence[Descent]) -> Figure:
    """Distance of the class means to their nearest ETF by step, one panel for each K."""
    counts = sorted({run.key.classes for run in runs})
    figure = new_figure(1.2 + 3.9 * len(counts), 3.6)
    panels = figure.subplots(1, len(counts), sharey=True, squeeze=False)[0]
    for axes, count in zip(panels, counts, strict=True):
        for distance in DISTANCES:
            axes.axhline(distance, color="#999999", linewidth=0.8, linestyle=":")
        _draw(axes, [run for run in runs if run.key.classes == count], "etf_distance")
        axes.set(title=f"{count} classes", ylim=(1e-3, 1), xlabel="step")
    panels[0].set_ylabel("class means to nearest ETF")
    legend_beside(figure, panels[0])
    return figure


def collapse_figure(runs: Sequence[Descent]) -> Figure:
    """NC1, NC2 and NC3 by step, one row of panels for each K."""
    counts = sorted({run.key.classes for run in runs})
    # With one sample a class NC1 is zero all along, which a log axis cannot show.
    shown = [name for name in PANELS if any(row[name] > 0 for run in runs for row in run.history[1:])]
    figure = new_figure(11, 0.6 + 2.6 * len(counts))
    grid = figure.subplots(len(counts), len(shown), squeeze=False, sharex=True)
    for line, count in zip(grid, counts, strict=True):
        for axes, name in zip(line, shown, strict=True):
            _draw(axes, [run for run in runs if run.key.classes == count], name)
            axes.set_ylim(bottom=max(axes.get_ylim()[0], 1e-5))  # below is rounding
        line[0].set_ylabel(f"{count} classes")
    for top, bottom, name in zip(grid[0], grid[-1], shown, strict=True):
        top.set_title(PANELS[name])
        bottom.set_xlabel("step")
    legend_beside(figure, figure.axes[0])
    return figure


def _draw(axes: Axes, runs: Sequence[Descent], name: str) -> None:
    """Median over the seeds of each head by step, and a band from the lowest to the highest."""
    for head in sorted(HEAD_COLORS, key=lambda head: head in DASHED):
        histories = [run.history[1:] for run in runs if run.key.head == head]  # a log axis has no step 0
        if histories:
            curves = [[row[name] for row in history] for history in histories]
            style = {"color": HEAD_COLORS[head], "linestyle": "--" if head in DASHED else "-"}
            steps = [row["step"] for row in histories[0]]
            draw_band(axes, steps, curves, middle=np.median, label=head, **style)
    axes.set(xscale="log", yscale="log")
    in_plain_numbers(axes)
    axes.xaxis.set_major_formatter("{x:g}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the experiments from the command line and return the exit status."""

    def experiment(settings: Settings) -> None:
        settings.check()
        chosen = check_theory if settings.theory else sweep if settings.sweep else compare
        chosen(settings, make_console())

    return command(Settings, experiment, argv)


if __name__ == "__main__":
    sys.exit(main())
