"""Which options of the nearest head matter: train with one change at a time, the other options as given.

    python examples/sweep.py                                               the sweep of docs/evidence/study.md
    python examples/sweep.py --head fixed --trials "lr 0.02" "lr 0.1" "lr 0.1, optimizer adamw"
    python examples/sweep.py --resume                                      continue what was killed

Trials are run by Ray Tune (pip install 'etflayers[sweeps]'), as many at a time as `--jobs`. The output folder
gets a row for each trial (trials.csv) and the means over the seeds (sweep.csv and sweep.md).
"""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from statistics import fmean
from typing import Any, ClassVar

import tyro
from rich.console import Console

from etflayers.checks import require
from etflayers.errors import NonFiniteError
from lab.classifiers import train
from lab.data import load
from lab.files import Row
from lab.heads import HeadName
from lab.options import Count, Distinct, Free, Seed, command
from lab.progress import make_console
from lab.results import Results, grouped
from lab.settings import Settings
from lab.training import threads
from lab.tuning import local_ray

EARLY = 2  # the epoch at which the first accuracy is read
UNCHANGED = "as given"

# What a trial reports of its last epoch: name of the column, key of the history, factor.
COLUMNS = {
    "test accuracy %": ("test_accuracy", 100),
    "NC1 trace": ("train_nc1_trace", 1),
    "NC2 ETF distance": ("train_nc2_etf_distance_means", 1),
    "NC3 dual distance": ("train_nc3_distance", 1),
    "NC4 test mismatch %": ("test_nc4_disagreement", 100),
}


@dataclass(frozen=True, kw_only=True)
class SweepSettings(Settings):
    """Train with one change at a time, the other options as given."""

    default_out: ClassVar[str] = "runs/sweep"

    head: Free[Distinct[HeadName]] = ("nearest",)
    """The head to train; one."""
    seeds: Free[Distinct[Seed]] = (0, 1)
    """Each trial is trained once with each seed."""
    trials: Free[tuple[str, ...]] = (
        *(f"scale {value}" for value in (0.5, 2, 5)),
        "scale 5, normalize",
        "scale 10, normalize",
        *(f"momentum {value}" for value in (0.03, 0.3, 0.6, 1.0, "None", "2/(t+1)")),
        *(f"proximity {value}" for value in (0, 0.03, 0.3)),
        "no-center",
        "head nearest-detached",
        "no-center, head nearest-detached",
        "schedule step",
        "schedule constant",
        "head fixed",
        "head standard",
    )
    """What each trial changes: options without their dashes, several with commas between. There is always
    one that changes nothing."""
    jobs: Free[Count] = 1
    """Trials at a time."""

    def check(self) -> None:
        super().check()
        require(len(self.head) == 1, f"--head must name one head to sweep, got {self.head}")
        for trial in self.trials:
            self.changed(trial).check()

    def changed(self, trial: str) -> Settings:
        """The settings of a trial, read by the parser that reads the command line."""
        given = Settings(**{field.name: getattr(self, field.name) for field in fields(Settings)})
        changes = [] if trial == UNCHANGED else [f"--{option.strip()}" for option in trial.split(",")]
        return tyro.cli(Settings, args=shlex.split(" ".join(changes)), default=given)


def run_trial(trial: str, seed: int, settings: SweepSettings) -> Row:
    """Train once: the numbers of the last epoch, and how fast it came there."""
    row: Row = {"trial": trial, "seed": seed}
    own = settings.folder / trial.replace("/", ":").replace(" ", "_")
    changed = replace(settings.changed(trial), seeds=(seed,), out=own)
    with threads(changed.cpu_threads):
        try:
            run = train(changed.head[0], seed, changed, load(changed).to(changed.torch_device))
        except NonFiniteError:
            return row | {"diverged": True}  # a finding, and no reason to lose the other trials
    early = run.history[min(EARLY, len(run.history) - 1)]
    fitted = math.inf if run.epochs_to_fit is None else run.epochs_to_fit
    row |= {"diverged": False, f"test accuracy % after {EARLY} epochs": 100 * early["test_accuracy"]}
    row |= {"epochs to 99.9% train": fitted}
    return row | {name: factor * run.last[key] for name, (key, factor) in COLUMNS.items() if key in run.last}


def sweep(settings: SweepSettings, console: Console) -> list[Row]:
    """Run all trials, write their tables and return the means over the seeds."""
    settings.check()
    settings = replace(settings, out=settings.folder.resolve())  # a worker runs in another folder
    plan = [(trial, seed) for trial in (UNCHANGED, *settings.trials) for seed in settings.seeds]
    results = Results(settings.folder, console)
    rows = in_parallel(plan, settings)
    table = means(rows)
    results.csv("trials", rows)
    results.csv("sweep", table)
    results.text("sweep.md", markdown(table))
    console.print(markdown(table), highlight=False, soft_wrap=True)
    return table


def in_parallel(plan: Sequence[tuple[str, int]], settings: SweepSettings) -> list[Row]:
    """The row of each trial of a plan, in its order."""

    def trainable(config: Mapping[str, Any]) -> Row:
        return {"row": run_trial(*plan[config["number"]], settings)}

    with local_ray(settings.jobs) as tune:
        results = tune.Tuner(
            trainable,
            param_space={"number": tune.grid_search(list(range(len(plan))))},
            tune_config=tune.TuneConfig(reuse_actors=True),
            run_config=tune.RunConfig(storage_path=str(settings.folder / "ray"), verbose=0),
        ).fit()
    for result in results:
        if result.error is not None:
            raise result.error
    return [result.metrics["row"] for result in sorted(results, key=lambda result: result.config["number"])]


def means(rows: Sequence[Row]) -> list[Row]:
    """One row for each trial: means over the seeds, of which none may have diverged."""
    table = []
    for (trial,), same in grouped(rows, "trial").items():
        columns = [name for name in same[0] if name not in ("trial", "seed", "diverged")]
        diverged = sum(row["diverged"] for row in same)
        mean = {} if diverged else {name: fmean(row[name] for row in same) for name in columns}
        table.append({"trial": trial, "seeds": len(same), "diverged": diverged} | mean)
    return table


def markdown(table: Sequence[Row]) -> str:
    """The rows of :func:`means` as a Markdown table."""
    columns = [name for name in table[0] if name not in ("trial", "seeds", "diverged")]
    lines = ["| change | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in table:
        cells = [_cell(row.get(name), name) for name in columns]
        if row["diverged"]:
            cells[0] = f"{row['diverged']} of {row['seeds']} diverged"
        lines.append(f"| {row['trial']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(value: float | None, name: str) -> str:
    if value is None:
        return ""
    if math.isinf(value):
        return "never"
    return f"{value:.2f}" if "%" in name and "epochs to" not in name else f"{value:.3g}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sweep from the command line and return the exit status."""
    return command(SweepSettings, lambda settings: sweep(settings, make_console()), argv)


if __name__ == "__main__":
    sys.exit(main())
