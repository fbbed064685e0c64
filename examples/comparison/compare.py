"""The comparison from settings to files."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from comparison import data, reporting
from comparison.costs import memory_report, step_times
from comparison.figures import write_figures
from comparison.models import LABELS
from comparison.settings import HeadName, Settings
from comparison.training import Row, Run, run_name, train


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
    with _threads(settings.cpu_threads):
        images = data.load(settings).to(settings.torch_device)
        title = f"{LABELS.get(settings.model, settings.model)} on {images.name}"
        console.print(
            f"{title}: {len(images.train)} images to train, {len(images.test)} to test, "
            f"{images.num_classes} classes; epochs: {settings.epochs}, device: {settings.torch_device}"
        )
        if settings.feature_dim is not None:
            sizes = memory_report(settings, images)
            console.print(reporting.memory_table(sizes, settings.batch_size))
            files.append(reporting.write_csv(folder / "memory.csv", [vars(size) for size in sizes]))
        runs = []
        for seed in settings.seeds:
            for head in settings.head:
                runs.append(_train_with_bar(head, seed, settings, images, console))
                files += reporting.write_run(folder, runs[-1], plain)
        times = step_times([run for run in runs if run.seed == settings.seeds[0]], settings, images)
    rows = reporting.summary_rows(runs, times)
    files.append(reporting.write_csv(folder / "summary.csv", rows))
    files.append(reporting.write_json(folder / "summary.json", {"settings": plain, "heads": rows}))
    files += write_figures(folder, runs, title)
    seeds = f", mean ± deviation of {len(settings.seeds)} seeds" if len(settings.seeds) > 1 else ""
    console.print(reporting.summary_table(rows, f"{title}, epochs: {settings.epochs}{seeds}"))
    names = ", ".join(path.name for path in files)
    console.print(f"{time.perf_counter() - started:.0f} s. Written to {folder}: {names}", highlight=False)
    return runs


def _train_with_bar(
    head: HeadName, seed: int, settings: Settings, images: data.ImageData, console: Console
) -> Run:
    checkpoint = settings.folder / "checkpoints" / f"{run_name(head, seed)}.pt"
    started = time.perf_counter()
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[row]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(f"{head} (seed {seed})", row="", total=None)

        def progress(step: int, total: int, row: Row | None) -> None:
            bar.update(task, completed=step, total=total)
            if row is not None:
                bar.update(task, row=f"test accuracy {row['test_accuracy']:.2%}")

        run = train(head, seed, settings, images, checkpoint, progress)
    console.print(
        f"{head:8} seed {seed}: train accuracy {run.last['train_accuracy']:.2%}, "
        f"test accuracy {run.last['test_accuracy']:.2%}, {time.perf_counter() - started:.0f} s",
        highlight=False,
    )
    return run


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
