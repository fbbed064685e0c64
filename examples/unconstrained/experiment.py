"""From settings to files: the comparison of the heads, and the sweep of the options of the nearest head."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from unconstrained import reporting
from unconstrained.descent import Run, RunKey, descend
from unconstrained.figures import write_figures
from unconstrained.settings import HeadName, Settings

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


def compare(settings: Settings, console: Console) -> list[Run]:
    """Descend with every head for every number of classes and seed; write tables and figures.

    Raises:
        InvalidArgumentError: settings that cannot be run.
        MissingDependencyError: a package that the settings need is not installed.
        NonFiniteError: a descent has diverged.
    """
    settings.check()
    runs: dict[RunKey, Run] = {}

    def run(keys: Iterable[RunKey]) -> list[Run]:
        for key in keys:
            if key not in runs:
                runs[key] = _descend_and_tell(key, settings, settings.out / "checkpoints", console)
        return [runs[key] for key in keys]

    comparisons = {
        "common": run(_keys(settings, {head: settings.lr for head in settings.heads}, settings.classes))
    }
    if settings.lr_grid:
        selected: list[Run] = []
        for classes in settings.classes:
            rates = {}
            for head in settings.heads:
                tried = run([RunKey(classes, head, lr, settings.seeds[0]) for lr in settings.lr_grid])
                rates[head] = min(tried, key=_slowness).key.lr
            selected += run(_keys(settings, rates, (classes,)))
        comparisons["selected"] = selected

    folder, summaries = settings.out, {}
    files = [reporting.write_runs(folder / "runs.csv", list(runs.values()))]
    for rate, compared in comparisons.items():
        summaries[rate] = reporting.summary_rows(compared)
        for classes in settings.classes:
            rows = [row for row in summaries[rate] if row["classes"] == classes]
            title = f"Steps until the means are an ETF, {classes} classes, {rate} learning rate"
            console.print(reporting.summary_table(rows, title))
        files += write_figures(folder, compared, f"-{rate}")
    files.append(reporting.write_summary(folder / "summary.json", settings, summaries))
    console.print(f"Written to {folder}: {', '.join(path.name for path in files)}", highlight=False)
    return list(runs.values())


def sweep(settings: Settings, console: Console) -> list[dict[str, Any]]:
    """Change the options of the nearest head one at a time; it raises what :func:`compare` raises."""
    settings.check()
    table = []
    for classes in settings.classes:
        rows = []
        for label, change in SWEEP.items():
            head: HeadName = "nearest-detached" if label == "detached frame" else "nearest"
            changed = replace(settings, **change)
            folder = settings.out / "checkpoints" / label.replace(" ", "-")
            keys = _keys(settings, {head: settings.lr}, (classes,))
            runs = [_descend_and_tell(key, changed, folder, console, label) for key in keys]
            (row,) = reporting.summary_rows(runs)
            rows.append({"options": label, **row})
        console.print(reporting.summary_table(rows, f"Steps of the nearest head, {classes} classes"))
        table += rows
    file = reporting.write_summary(settings.out / "sweep.json", settings, {"sweep": table})
    console.print(f"Written to {file}", highlight=False)
    return table


def _keys(settings: Settings, rates: dict[HeadName, float], classes: Sequence[int]) -> list[RunKey]:
    return [
        RunKey(count, head, lr, seed)
        for count in classes
        for head, lr in rates.items()
        for seed in settings.seeds
    ]


def _slowness(run: Run) -> tuple[float, float]:
    steps = run.steps_to(reporting.DISTANCES[-1])
    return math.inf if steps is None else steps, run.history[-1]["etf_distance"]


def _descend_and_tell(
    key: RunKey, settings: Settings, folder: Path, console: Console, label: str = ""
) -> Run:
    run = descend(key, settings, folder / f"{key.name}.pt")
    steps = [run.steps_to(distance) for distance in reporting.DISTANCES]
    reached = ", ".join(
        f"{distance:g} {'never' if step is None else f'after {step}'}"
        for distance, step in zip(reporting.DISTANCES, steps, strict=True)
    )
    console.print(
        f"{key.name} {label}: distance {reached}, {run.seconds:.1f} s", highlight=False, soft_wrap=True
    )
    return run
