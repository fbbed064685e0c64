"""The study from settings to files."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

from rich.console import Console

from comparison.data import ImageData
from comparison.progress import load_and_tell, threads, train_with_bar
from comparison.ranks import process_group, rank
from comparison.reporting import write_json, write_run
from comparison.settings import HeadName
from comparison.training import Run, run_name
from study import summary
from study.figures import write_figures
from study.loggers import open_loggers
from study.report import write_report
from study.settings import StudySettings


def study(settings: StudySettings, console: Console, command: str) -> list[Run]:
    """Train every head for every seed; write tables, figures and the report; print the summary.

    Args:
        settings: of the study.
        console: to print on; the first of several ranks prints.
        command: what the user typed, for the report.

    Raises:
        InvalidArgumentError: settings that cannot be trained.
        MissingDependencyError: a package that the settings need is not installed.
        NonFiniteError: a training has diverged.
    """
    settings.check()
    with process_group(settings.torch_device), threads(settings.cpu_threads):
        console = console if rank() == 0 else Console(quiet=True)
        started = time.perf_counter()
        images, title = load_and_tell(settings, console)
        runs = [
            _train(head, seed, settings, images, console) for seed in settings.seeds for head in settings.head
        ]
        if rank() == 0:
            _write(runs, settings, title, command, console)
            console.print(f"{time.perf_counter() - started:.0f} s. Written to {settings.folder}: report.html")
    return runs


def _train(head: HeadName, seed: int, settings: StudySettings, images: ImageData, console: Console) -> Run:
    if rank() > 0:
        return train_with_bar(head, seed, settings, images, console)
    loggers = open_loggers(settings, run_name(head, seed))
    with closing(loggers):
        run = train_with_bar(head, seed, settings, images, console, on_row=loggers.log)
    write_run(settings.folder, run, settings.fingerprint())
    return run


def _write(runs: list[Run], settings: StudySettings, title: str, command: str, console: Console) -> None:
    folder: Path = settings.folder
    rows = summary.summary_rows(runs)
    summary.write_tables(folder, runs)
    write_json(folder / "settings.json", settings.fingerprint())
    figures = write_figures(folder, runs, title)
    write_report(folder, runs, figures, settings.fingerprint(), title, command)
    console.print(
        summary.summary_table(rows, f"{title}, epochs: {settings.epochs}, seeds: {len(settings.seeds)}")
    )
