"""Study how networks with different classifier heads collapse.

    python examples/collapse_study.py                                     five heads, three seeds, MNIST
    python examples/collapse_study.py --head fixed nearest --loss mse --weight-decay 0 --feature-decay 1e-3
    python examples/collapse_study.py --imbalance step --imbalance-ratio 20 --balanced
    python examples/collapse_study.py --data fashion                      or glyphs, digits, folder, ...
    python examples/collapse_study.py --devices 2                         two processes under torchrun
    python examples/collapse_study.py --resume                            continue what was killed
    python examples/collapse_study.py --explorer                          and a page to watch the collapse on
    python examples/collapse_study.py --help                              everything else

The output folder gets the history of every run (HEAD-seedN.csv and .json), all numbers as one long table
(measures.csv), a summary over the seeds (summary.csv and .json), figures, checkpoints and report.html, which
shows all of it in a browser. Metrics are those of docs/understand/metrics.md, in eval mode on the whole
training and test set, at the start (epoch 0) and after each epoch.
"""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean, median, stdev
from typing import ClassVar

from rich.console import Console
from rich.table import Table

from etflayers.checks import require, require_module
from lab.classifiers import Trained, load_and_tell, run_name, train_and_tell
from lab.explorer import FILE, PAGE, exploration, write_exploration, write_page
from lab.files import Row
from lab.heads import HeadName
from lab.loggers import WandbMode, loggers
from lab.measures import existing
from lab.options import Count, Distinct, Free, Seed, command
from lab.pictures import study_pictures
from lab.progress import make_console
from lab.ranks import end_with, launch, launched, process_group, rank, require_devices
from lab.report import flat, write_report
from lab.results import Column, Results, grouped, summary_table
from lab.settings import Settings
from lab.training import threads

ETF_THRESHOLDS = (0.2, 0.1, 0.05)
STATISTICS = {"mean": fmean, "std": stdev, "median": median, "min": min, "max": max}
HEADLINES = (
    Column("train\nacc. %", "train_accuracy", ".2f", percent=True),
    Column("test\nacc. %", "test_accuracy", ".2f", percent=True),
    Column("100%\nepoch", "epochs_to_100", ".1f"),
    Column("NC1\ntrace", "train_nc1_trace", ".2g"),
    Column("NC2\nETF", "train_nc2_etf_distance_means", ".2g"),
    Column("NC3\ndual", "train_nc3_distance", ".2g"),
    Column("NC4\ntest %", "test_nc4_disagreement", ".2f", percent=True),
    Column("cosine\nmargin", "train_margin_mean"),
)


@dataclass(frozen=True, kw_only=True)
class StudySettings(Settings):
    """Train classifier heads with several seeds and measure how they collapse.

    All heads get the same backbone at the start, the same batches in the same order and the same learning
    rates.
    """

    default_out: ClassVar[str] = "runs/study"

    head: Free[Distinct[HeadName]] = ("standard", "fixed", "nearest", "nearest-detached", "learned")
    """Heads to train. linear: nn.Linear; standard: a learned weight with rows of length 1, without a bias;
    fixed, nearest, learned: the ETF heads of this library; nearest-detached: nearest, without the gradient
    through the frame."""
    seeds: Free[Distinct[Seed]] = (0, 1, 2)
    """One training of each head for each seed."""
    epochs: Count = 20
    """Passes over the training set."""
    devices: Free[Count] = 1
    """Processes that share every batch, each on a device of its own: CUDA with nccl, the CPU with gloo."""
    tensorboard: Free[bool] = False
    """Write event files for TensorBoard into OUT/tensorboard."""
    wandb: Free[WandbMode] = "off"
    """Log to Weights & Biases; offline into OUT/wandb, to be sent later with `wandb sync`."""
    explorer: Free[bool] = False
    """Record class means, some features and the classifier after each epoch, and write OUT/explorer.html,
    which shows how they move in three dimensions."""

    def check(self) -> None:
        super().check()
        require(
            self.batch_size % self.devices == 0,
            f"--batch-size {self.batch_size} must be a multiple of --devices {self.devices}: every device "
            "takes an equal share",
        )
        require_devices(self.devices, self.torch_device)
        if self.explorer:
            require_module("plotly", extra="examples")  # before hours of training, not after


def study(settings: StudySettings, console: Console, command: str) -> list[Trained]:
    """Train every head for every seed; write tables, figures and the report; print the summary.

    Args:
        settings: of the study.
        console: to print on; the first of several ranks prints.
        command: what the user typed, for the report.
    """
    settings.check()
    with process_group(settings.torch_device), threads(settings.cpu_threads):
        first = rank() == 0
        results = Results(settings.folder, console if first else Console(quiet=True))
        data, title = load_and_tell(settings, results.console)
        tracked = {"tensorboard": first and settings.tensorboard, "wandb": settings.wandb if first else "off"}
        runs, plain = [], settings.fingerprint()
        for seed, head in product(settings.seeds, settings.head):
            with loggers(settings.folder, run_name(head, seed), plain, **tracked) as log:
                recorded = settings.explorer
                run = train_and_tell(head, seed, settings, data, results.console, log, recorded=recorded)
                runs.append(run)
            if first:
                results.run(runs[-1], plain)
        if first:
            if settings.explorer:
                content = exploration(runs, title, data.class_names)
                write_page(write_exploration(settings.folder / FILE, content).with_name(PAGE), [content])
            _write(runs, settings, title, command, results)
    return runs


def _write(runs: list[Trained], settings: StudySettings, title: str, command: str, results: Results) -> None:
    rows, plain = summary_rows(runs), settings.fingerprint()
    results.csv("measures", tidy_rows(runs))
    results.csv("summary", rows)
    results.json("summary", rows)
    results.json("settings", plain)
    figures = results.figures(study_pictures(runs, title))
    write_report(settings.folder, runs, rows, HEADLINES, figures, plain, title, command)
    results.console.print(
        headline_table(rows, f"{title}, epochs: {settings.epochs}, seeds: {len(settings.seeds)}")
    )
    results.names = ["report.html"] + [PAGE] * settings.explorer  # which show all the others
    results.tell()


def tidy_rows(runs: Sequence[Trained]) -> list[Row]:
    """A long table: one row for each number that exists."""
    return [
        {"head": run.head, "seed": run.seed, "epoch": int(row["epoch"]), "measure": measure, "value": value}
        for run in runs
        for row in run.history
        for measure, value in existing(row).items()
    ]


def summary_rows(runs: Sequence[Trained]) -> list[Row]:
    """One row for each head and measure: its last value over the seeds.

    ``epochs_to_100`` is the first epoch with a train accuracy of 1, ``epochs_to_etf_X`` the first at which
    the class means are no further than X from their nearest ETF. ``seeds`` counts those that have a value;
    where some seed has none, the statistics are empty: a mean over those that got there would flatter.
    """
    rows = []
    for head in dict.fromkeys(run.head for run in runs):
        same = [run for run in runs if run.head == head]
        for table in ([existing(run.last) for run in same], [_milestones(run.history) for run in same]):
            for measure in dict.fromkeys(name for row in table for name in row):
                values = [row.get(measure) for row in table]
                rows.append({"head": head, "measure": measure, **_statistics(values)})
    return rows


def _milestones(history: Sequence[Row]) -> Row:
    """The first epochs at which something was reached."""
    distance = "train_nc2_etf_distance_means"
    reached = {"epochs_to_100": [row["epoch"] for row in history if row["train_accuracy"] == 1]}
    for bound in ETF_THRESHOLDS:
        near = [row["epoch"] for row in history if row.get(distance, math.inf) <= bound]
        reached[f"epochs_to_etf_{bound}"] = near
    return {name: epochs[0] if epochs else None for name, epochs in reached.items()}


def _statistics(values: Sequence[float | None]) -> Row:
    known = [value for value in values if value is not None]
    found: Row = dict.fromkeys(STATISTICS)
    if len(known) == len(values):
        wanted = {name: f for name, f in STATISTICS.items() if name != "std" or len(known) > 1}
        found |= {name: statistic(known) for name, statistic in wanted.items()}
    return found | {"seeds": len(known)}


def headline_table(rows: Sequence[Row], title: str) -> Table:
    """The headline measures of each head, mean above standard deviation, for the terminal."""
    flattened = [
        {"head": head.replace("-", "-\n"), **flat({row["measure"]: row for row in same})}
        for (head,), same in grouped(rows, "head").items()
    ]
    return summary_table(title, {"head": "head"}, HEADLINES, flattened, plus_minus="\n±")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a study from the command line and return the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)

    def run(settings: StudySettings) -> None:
        if settings.devices > 1 and not launched():
            launch(__file__, arguments, settings.devices)
        else:
            study(settings, make_console(), shlex.join(["python", "examples/collapse_study.py", *arguments]))

    return command(StudySettings, run, arguments)


if __name__ == "__main__":
    end_with(main)
