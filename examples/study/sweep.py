"""A training for each of several changes to the same settings, side by side."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import tyro
from rich.console import Console

from comparison import data
from comparison.checkpoints import write_atomically
from comparison.progress import threads
from comparison.reporting import write_csv
from comparison.settings import HeadName, Settings
from comparison.training import Run, train
from etflayers.checks import require, require_module
from etflayers.errors import NonFiniteError

EARLY = 2  # the epoch at which the first accuracy is read

# What a trial reports of its last epoch: name of the column, key of the history, factor.
COLUMNS = {
    "test accuracy %": ("test_accuracy", 100),
    "NC1 trace": ("train_nc1_trace", 1),
    "NC2 ETF distance": ("train_nc2_etf_distance_means", 1),
    "NC3 dual distance": ("train_nc3_distance", 1),
    "NC4 test mismatch %": ("test_nc4_disagreement", 100),
}

UNCHANGED = "as given"


@dataclass(frozen=True, kw_only=True)
class SweepSettings(Settings):
    """Train with one change at a time, the other options as given."""

    free_on_resume: ClassVar[frozenset[str]] = Settings.free_on_resume | {"trials", "jobs"}

    head: tuple[HeadName, ...] = ("nearest",)
    """The head to train; one."""
    seeds: tuple[int, ...] = (0, 1)
    """Each trial is trained once with each seed."""
    trials: tuple[str, ...] = (
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
    jobs: int = 1
    """Trials at a time."""

    def check(self) -> None:
        super().check()
        require(len(self.head) == 1, f"--head must name one head to sweep, got {self.head}")
        require(self.jobs >= 1, f"--jobs must be at least 1, got {self.jobs}")
        for trial in self.trials:
            self.changed(trial).check()

    @property
    def folder(self) -> Path:
        return self.out or Path("runs/sweep")

    def changed(self, trial: str) -> Settings:
        """The settings of a trial, read by the parser that reads the command line."""
        given = Settings(**{field.name: getattr(self, field.name) for field in fields(Settings)})
        changes = [] if trial == UNCHANGED else [f"--{option.strip()}" for option in trial.split(",")]
        return tyro.cli(Settings, args=shlex.split(" ".join(changes)), default=given)


def run_trial(trial: str, seed: int, settings: SweepSettings) -> dict[str, Any]:
    """Train once: the numbers of the last epoch, and how fast it came there."""
    row: dict[str, Any] = {"trial": trial, "seed": seed}
    name = trial.replace("/", ":").replace(" ", "_")
    checkpoint = settings.folder / "checkpoints" / f"{name}-seed{seed}.pt"
    changed = replace(settings.changed(trial), seeds=(seed,))
    with threads(changed.cpu_threads):
        images = data.load(changed).to(changed.torch_device)
        try:
            run = train(changed.head[0], seed, changed, images, checkpoint, lambda *_: None)
        except NonFiniteError:
            return row | {"diverged": True}  # a finding, and no reason to lose the other trials
    return row | {"diverged": False} | _numbers(run)


def _numbers(run: Run) -> dict[str, Any]:
    early = run.history[min(EARLY, len(run.history) - 1)]
    numbers: dict[str, Any] = {
        f"test accuracy % after {EARLY} epochs": 100 * early["test_accuracy"],
        "epochs to 99.9% train": math.inf if run.epochs_to_fit is None else run.epochs_to_fit,
    }
    return numbers | {
        column: factor * run.last[key] for column, (key, factor) in COLUMNS.items() if key in run.last
    }


def sweep(settings: SweepSettings, console: Console) -> list[dict[str, Any]]:
    """Run all trials, write their tables and return the means over the seeds.

    Raises:
        InvalidArgumentError: settings that cannot be trained.
        MissingDependencyError: Ray Tune is not installed.
    """
    settings.check()
    settings = replace(settings, out=settings.folder.resolve())  # a worker runs in another folder
    plan = [(trial, seed) for trial in (UNCHANGED, *settings.trials) for seed in settings.seeds]
    rows = in_parallel(plan, settings)
    table = means(rows)
    write_csv(settings.folder / "trials.csv", rows)
    write_csv(settings.folder / "sweep.csv", table)
    text = markdown(table)
    write_atomically(settings.folder / "sweep.md", text.encode())
    console.print(text, highlight=False, soft_wrap=True)
    return table


def in_parallel(plan: Sequence[tuple[str, int]], settings: SweepSettings) -> list[dict[str, Any]]:
    """The row of each trial of a plan, in its order."""
    ray, tune = require_module("ray", extra="sweeps"), require_module("ray.tune", extra="sweeps")

    def trainable(config: Mapping[str, Any]) -> dict[str, Any]:
        return {"row": run_trial(*plan[config["number"]], settings)}

    ray.init(num_cpus=settings.jobs, include_dashboard=False, log_to_driver=False)
    try:
        results = tune.Tuner(
            trainable,
            param_space={"number": tune.grid_search(list(range(len(plan))))},
            tune_config=tune.TuneConfig(reuse_actors=True),
            run_config=tune.RunConfig(storage_path=str(settings.folder / "ray"), verbose=0),
        ).fit()
    finally:
        ray.shutdown()
    for result in results:
        if result.error is not None:
            raise result.error
    return [result.metrics["row"] for result in sorted(results, key=lambda result: result.config["number"])]


def means(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each trial: means over the seeds, of which none may have diverged."""
    table = []
    for trial in dict.fromkeys(row["trial"] for row in rows):
        same = [row for row in rows if row["trial"] == trial]
        columns = [name for name in same[0] if name not in ("trial", "seed", "diverged")]
        diverged = sum(row["diverged"] for row in same)
        mean = {} if diverged else {name: fmean(row[name] for row in same) for name in columns}
        table.append({"trial": trial, "seeds": len(same), "diverged": diverged} | mean)
    return table


def markdown(table: Sequence[Mapping[str, Any]]) -> str:
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
