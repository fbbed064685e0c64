"""The comparison from settings to files."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from comparison import reporting
from comparison.costs import memory_report, step_times
from comparison.figures import write_figures
from comparison.progress import load_and_tell, threads, train_with_bar
from comparison.settings import Settings
from comparison.training import Run


def compare(settings: Settings, console: Console) -> list[Run]:
    """Train every head for every seed, write tables and figures, and print the summary.

    Raises:
        InvalidArgumentError: settings that cannot be trained.
        MissingDependencyError: a package that the settings need is not installed.
        NonFiniteError: a training has diverged.
    """
    settings.check()
    started = time.perf_counter()
    folder, plain = settings.folder, settings.fingerprint()
    files: list[Path] = []
    with threads(settings.cpu_threads):
        images, title = load_and_tell(settings, console)
        if settings.feature_dim is not None:
            sizes = memory_report(settings, images)
            console.print(reporting.memory_table(sizes, settings.batch_size))
            files.append(reporting.write_csv(folder / "memory.csv", [vars(size) for size in sizes]))
        runs = []
        for seed in settings.seeds:
            for head in settings.head:
                runs.append(train_with_bar(head, seed, settings, images, console))
                files += reporting.write_run(folder, runs[-1], plain)
        times = step_times([run for run in runs if run.seed == settings.seeds[0]], settings, images)
    rows = reporting.summary_rows(runs, times)
    files.append(reporting.write_csv(folder / "summary.csv", rows))
    files.append(reporting.write_json(folder / "summary.json", {"settings": plain, "heads": rows}))
    files += write_figures(folder, runs, title)
    seeds = f", mean ± deviation of {len(settings.seeds)} seeds" if len(settings.seeds) > 1 else ""
    console.print(reporting.summary_table(rows, f"{title}, epochs: {settings.epochs}{seeds}"))
    console.print(reporting.collapse_table(rows))
    names = ", ".join(path.name for path in files)
    console.print(f"{time.perf_counter() - started:.0f} s. Written to {folder}: {names}", highlight=False)
    return runs
