"""More classes than features: 2103 glyphs and heads with 16 to 256 features, on faces never seen.

    python examples/many_classes.py --seeds 0 1 2                all heads: an hour on one core
    python examples/many_classes.py --classes 300 --features 16 --epochs 3     a first look, minutes
    python examples/many_classes.py --resume                     continue what was killed
    python examples/many_classes.py --help                       everything else

Every head gets the same network, the same batches and the same learning rate. Eight faces are learned, two
validate each epoch, and two are looked at once, at the end. The output folder gets every epoch of every run
(runs.csv), means over the seeds (summary.csv), a figure and checkpoints.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import product

from matplotlib.figure import Figure
from rich.console import Console

from codes.training import CodeRun, Key, ManyClassesSettings, exists
from lab.data import load
from lab.figures import PALETTE, in_percent, legend_beside, new_figure
from lab.files import Row
from lab.options import command
from lab.progress import bar, make_console
from lab.results import Column, Results, Section, grouped, mean_and_deviation
from lab.training import reproducible, threads

COLUMNS = (
    Column("test %", "test_accuracy", ".1f", percent=True),
    Column("train %", "train_accuracy", ".1f", percent=True),
    Column("GNC1", "gnc1_trace", ".2f"),
    Column("GNC2", "gnc2_largest_cosine_means", ".2f"),
    Column("GNC3", "gnc3_cosine", ".2f"),
)


# In the tables, and too many for a screen: megabytes of the head with its optimizer state, time of a step.
MEASURES = ("head_megabytes", "ms_per_step", "gnc2_largest_cosine_weights")


def compare(settings: ManyClassesSettings, console: Console) -> list[Row]:
    """Train every head with every number of features for every seed; return the means over the seeds."""
    settings.check()
    results = Results(settings.folder, console)
    data = load(settings).to(settings.torch_device)
    sizes = f"{len(data.train)} images to train, {len(data.test)} to test, {data.num_classes} classes"
    console.print(f"{data.name}: {sizes}; epochs: {settings.epochs}", highlight=False)
    rows: list[Row] = []
    with threads(settings.threads), reproducible(settings.torch_device):
        for features, seed, method in product(settings.features, settings.seeds, settings.methods):
            if exists(method, features, data.num_classes):
                key = Key(method, features, seed)
                rows += _train_and_tell(CodeRun(key, settings, data), settings, console)
                results.names.clear()
                results.csv("runs", rows)
    last = [row for row in rows if row["epoch"] == settings.epochs]
    summary = summary_rows(last)
    results.csv("summary", summary)
    results.figures({"accuracy": lambda: accuracy_figure(last)})
    seeds = f", mean ± deviation of {len(settings.seeds)} seeds" if len(settings.seeds) > 1 else ""
    labels = {"features": "features", "head": "method"}
    title = f"{data.num_classes} classes of {data.name}, epochs: {settings.epochs}{seeds}"
    results.table(Section(title, labels, COLUMNS, summary))
    results.report(f"{data.num_classes} classes of {data.name}", settings)
    results.tell()
    return summary


def _train_and_tell(run: CodeRun, settings: ManyClassesSettings, console: Console) -> list[Row]:
    name, checkpoint = run.key.name, settings.checkpoint(run.key.name)
    with bar(console, name, lambda row: f"validation {row['validation_accuracy']:.1%}") as shown:
        run.finish(checkpoint, resume=settings.resume, every=settings.checkpoint_every, progress=shown)
    row = run.history[-1]
    accuracies = ", ".join(
        f"{part} {row[f'{part}_accuracy']:.1%}" for part in ("train", "validation", "test")
    )
    console.print(f"{name}: {accuracies}, {shown.seconds:.0f} s", highlight=False)
    return run.history


def summary_rows(last: Sequence[Row]) -> list[Row]:
    """For each number of features and head the means and deviations over the seeds."""
    return [
        {"features": features, "method": method, "seeds": len(same)}
        | mean_and_deviation(
            same, ("validation_accuracy", *MEASURES, *(column.measure for column in COLUMNS))
        )
        for (features, method), same in grouped(last, "features", "method").items()
    ]


def accuracy_figure(last: Sequence[Row]) -> Figure:
    """Test accuracy by number of features: the mean over the seeds, and each seed as a point."""
    figure = new_figure(7.2, 4)
    axes = figure.subplots()
    for (method,), color in zip(grouped(last, "method"), PALETTE, strict=False):
        points = grouped((row for row in last if row["method"] == method), "features")
        means = [sum(row["test_accuracy"] for row in same) / len(same) for same in points.values()]
        features = [key[0] for key in points]
        axes.plot(features, means, color=color, label=method, marker="o", markersize=4)
        for (width,), same in points.items():
            axes.scatter(
                [width] * len(same), [row["test_accuracy"] for row in same], s=12, color=color, alpha=0.5
            )
    widths = sorted({row["features"] for row in last})
    axes.set(xscale="log", xlabel="number of features d", ylabel="accuracy on faces never seen")
    axes.set_xticks(widths, [str(width) for width in widths])
    axes.minorticks_off()
    in_percent(axes)
    legend_beside(figure, axes)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study from the command line and return the exit status."""
    return command(ManyClassesSettings, lambda settings: compare(settings, make_console()), argv)


if __name__ == "__main__":
    sys.exit(main())
