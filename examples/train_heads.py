"""Train a ResNet with a linear head and with simplex-ETF heads, and compare them.

    python examples/train_heads.py --demo                           all heads on 5000 MNIST images, minutes
    python examples/train_heads.py --seeds 0 1 2 --out runs/seeds   the same with three seeds
    python examples/train_heads.py --feature-dim K                  as many features as classes: what it saves
    python examples/train_heads.py --data glyphs --classes 62 --feature-dim K    letters in type never seen
    python examples/train_heads.py --data folder --data-dir FOLDER  your own images
    python examples/train_heads.py --resume                         continue what was killed
    python examples/train_heads.py --help                           everything else

The output folder gets the history of every run (HEAD-seedN.csv and .json), a summary of the heads
(summary.csv and .json), figures (.png) and checkpoints. Loss, accuracy and the metrics of neural collapse
are taken in eval mode over the whole training and test set: at the start (epoch 0) and after each epoch.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean

from rich.console import Console

from lab.classifiers import Trained, load_and_tell, train_and_tell
from lab.costs import memory_report, memory_table, step_times
from lab.files import Row
from lab.options import Flag, Free, command
from lab.pictures import comparison_pictures
from lab.progress import make_console
from lab.results import Column, Results, mean_and_deviation, summary_table
from lab.settings import Settings
from lab.training import threads

MEASURES = (
    "train_accuracy",
    "test_accuracy",
    "train_loss",
    "test_loss",
    "train_nc1_trace",
    "train_nc2_etf_distance_means",
    "train_nc3_distance",
    "test_nc4_disagreement",
    "test_margin_mean",
)
COLLAPSE = (
    Column("NC1\ntrace", "train_nc1_trace"),
    Column("NC2, ETF\ndistance", "train_nc2_etf_distance_means"),
    Column("NC3, dual\ndistance", "train_nc3_distance"),
    Column("NC4 test\nmismatch %", "test_nc4_disagreement", ".2f", percent=True),
    Column("cosine margin\non test images", "test_margin_mean"),
)


@dataclass(frozen=True)
class EpochsToFit(Column):
    """How many, or how many seeds have got there."""

    def text(self, row: Mapping[str, object], plus_minus: str = "") -> str:
        if row[self.measure] is not None:
            return f"{row[self.measure]:.3g}"
        return "never" if row["seeds"] == 1 else f"{row['fitted_seeds']} of {row['seeds']} seeds"


SUCCESS = (
    Column("train\naccuracy %", "train_accuracy", ".2f", percent=True),
    Column("test\naccuracy %", "test_accuracy", ".2f", percent=True),
    EpochsToFit("epochs to\n99.9%", "epochs_to_fit"),
    Column("ms\na step", "ms_per_step", ".1f"),
    Column("head\nshare", "head_share", ".1%"),
)


@dataclass(frozen=True, kw_only=True)
class ComparisonSettings(Settings):
    """Train a ResNet with a linear head and with simplex-ETF heads, and compare them.

    All heads get the same backbone at the start, the same batches in the same order and the same learning
    rates. The defaults are those of `--demo`: minutes on two CPU cores.
    """

    demo: Free[Flag] = False
    """Write into runs/demo. What is trained is what the other options say; their defaults are the demo."""

    @property
    def folder(self) -> Path:
        return Path("runs/demo") if self.demo and self.out is None else super().folder


def compare(settings: ComparisonSettings, console: Console) -> list[Trained]:
    """Train every head for every seed, write tables and figures, and print the summary."""
    settings.check()
    results, plain = Results(settings.folder, console), settings.fingerprint()
    with threads(settings.cpu_threads):
        data, title = load_and_tell(settings, console)
        if settings.feature_dim is not None:
            sizes = memory_report(settings, data)
            console.print(memory_table(sizes, settings.batch_size))
            results.csv("memory", [vars(size) for size in sizes])
        runs = []
        for seed, head in product(settings.seeds, settings.head):
            runs.append(train_and_tell(head, seed, settings, data, console))
            results.run(runs[-1], plain)
        times = step_times([run for run in runs if run.seed == settings.seeds[0]], settings, data)
    rows = summary_rows(runs, times)
    results.csv("summary", rows)
    results.json("summary", {"settings": plain, "heads": rows})
    results.figures(comparison_pictures(runs, title))
    seeds = f", mean ± deviation of {len(settings.seeds)} seeds" if len(settings.seeds) > 1 else ""
    head = {"head": "head"}
    console.print(summary_table(f"{title}, epochs: {settings.epochs}{seeds}", head, SUCCESS, rows))
    title = "Neural collapse at the end (see docs/understand/metrics.md)"
    console.print(summary_table(title, head, COLLAPSE, rows))
    results.tell()
    return runs


def summary_rows(runs: Sequence[Trained], times: Mapping[str, Row]) -> list[Row]:
    """One row for each head: last values as mean and standard deviation over the seeds, and costs.

    The epochs to 99.9% are empty where some seed has not got there.
    """
    rows = []
    for head, time in times.items():
        same = [run for run in runs if run.head == head]
        epochs = [run.epochs_to_fit for run in same if run.epochs_to_fit is not None]
        row: Row = {"head": head, "seeds": len(same)}
        row |= mean_and_deviation([run.last for run in same], MEASURES)
        whole = len(epochs) == len(same)
        row |= {"fitted_seeds": len(epochs), "epochs_to_fit": fmean(epochs) if whole else None}
        rows.append(row | time)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run a comparison from the command line and return the exit status."""
    return command(ComparisonSettings, lambda settings: compare(settings, make_console()), argv)


if __name__ == "__main__":
    sys.exit(main())
