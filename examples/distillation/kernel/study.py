"""The study of kernel inducing points, from settings to files."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from comparison import checkpoints
from comparison.figures import draw_figures
from comparison.progress import threads
from comparison.reporting import write_csv, write_json
from distillation.data import RealData, load_images
from distillation.kernel import report
from distillation.kernel.evaluation import full_accuracy, kernel_row, named_sets, network_rows
from distillation.kernel.learning import Learned, Row, learn, make_loop
from distillation.kernel.settings import KernelSettings
from etflayers.distill import write_png

__all__ = ["KernelSettings", "learn_kernel_set"]


def learn_kernel_set(settings: KernelSettings, console: Console) -> list[Row]:
    """Learn a set for each size and seed, compare it with baselines; write sets, tables and figures.

    Raises:
        InvalidArgumentError: settings that cannot be run.
        MissingDependencyError: a package that the settings need is not installed.
        NonFiniteError: learning has diverged.
    """
    settings = settings.resolved
    settings.check()
    started = time.perf_counter()
    rows: list[Row] = []
    histories: dict[int, list[list[Row]]] = {}
    with threads(settings.threads):
        data = load_images(settings.comparison, settings.image_size)
        full = _kept_full(settings, data)
        console.print(
            f"{settings.kernel} on {data.name}: {len(data.train)} images to learn from, {len(data.test)} to "
            "test on; "
            + ("too many for" if full is None else f"test accuracy {full:.2%} of")
            + " the kernel of all of them",
            highlight=False,
        )
        for per_class in settings.per_class:
            for seed in settings.seeds:
                learned = _learn_with_bar(settings, per_class, seed, data, console)
                histories.setdefault(per_class, []).append(learned.history)
                found = _kept_rows(settings, per_class, seed, data, learned)
                rows += found
                for row in found[:1]:
                    console.print(
                        f"{per_class} a class, seed {seed}: test accuracy {row['test_accuracy']:.2%}, "
                        f"{learned.seconds:.0f} s",
                        highlight=False,
                    )

    folder = settings.folder
    summary = report.summary_rows(rows)
    content = {"settings": settings.fingerprint(), "full": full, "summary": summary}
    files = [
        write_csv(folder / "sets.csv", rows),
        write_csv(folder / "summary.csv", summary),
        write_json(folder / "summary.json", content),
        *draw_figures(
            folder,
            {
                "accuracy": lambda _, title: report.accuracy_figure(summary, full, title),
                "learning": lambda _, title: report.learning_figure(histories, title),
            },
            [],
            f"{settings.kernel} kernel, {data.name}",
        ),
    ]
    for learner in dict.fromkeys(row["learner"] for row in summary):
        title = f"Test accuracy of {learner} trained on a few images of {data.name}, %"
        console.print(report.summary_table(summary, learner, title))
    console.print(
        f"{time.perf_counter() - started:.0f} s. Written to {folder}: "
        f"{', '.join(path.name for path in files)}, and the sets",
        highlight=False,
    )
    return rows


def _learn_with_bar(
    settings: KernelSettings, per_class: int, seed: int, data: RealData, console: Console
) -> Learned:
    """Learn a set, show how far it is, and write it with its picture."""
    name = f"{per_class}-a-class-seed{seed}"
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[row]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(name, row="", total=settings.outer_steps)

        def progress(step: int, row: Row) -> None:
            bar.update(task, completed=step, row=f"loss {row['loss']:.3f}, accuracy {row['accuracy']:.1%}")

        learned = learn(
            settings, per_class, seed, data, settings.folder / "checkpoints" / f"{name}.pt", progress
        )
    learned.distilled.metadata = {"settings": settings.fingerprint(), "seed": seed}
    learned.distilled.save(settings.folder / f"{name}.safetensors")
    if data.shape[0] in (1, 3):
        write_png(settings.folder / f"{name}.png", learned.distilled.images())
    write_csv(settings.folder / f"{name}-history.csv", learned.history)
    return learned


def _kept_full(settings: KernelSettings, data: RealData) -> float | None:
    """What the kernel of all training images is worth, from an earlier run where it may be used."""
    path = settings.folder / "checkpoints" / "all-images.pt"
    fingerprint = settings.fingerprint()
    if settings.resume and path.exists():
        full: float | None = checkpoints.load(path, fingerprint, settings.torch_device)["full"]
        return full
    full = full_accuracy(make_loop(settings, data), data)
    checkpoints.save(path, {"fingerprint": fingerprint, "full": full})
    return full


def _kept_rows(
    settings: KernelSettings, per_class: int, seed: int, data: RealData, learned: Learned
) -> list[Row]:
    """What the learned set and the baselines are worth, from an earlier run where it may be used."""
    path: Path = settings.folder / "checkpoints" / f"{per_class}-a-class-seed{seed}-rows.pt"
    judged: dict[str, Any] = {
        name: getattr(settings, name)
        for name in ("draws", "networks", "evaluations", "training_steps", "training_batch", "rate_grid")
    }
    fingerprint = {**settings.fingerprint(), **judged, "images of a class": per_class, "seed": seed}
    if settings.resume and path.exists():
        rows: list[Row] = checkpoints.load(path, fingerprint, settings.torch_device)["rows"]
        return rows
    loop = make_loop(settings, data)
    sets = named_sets(settings, per_class, seed, data, loop, learned.distilled)
    rows = [{**named.row(seed, per_class), **kernel_row(named, loop, data)} for named in sets]
    rows += network_rows(settings, per_class, seed, data, sets)
    checkpoints.save(path, {"fingerprint": fingerprint, "rows": rows})
    return rows
