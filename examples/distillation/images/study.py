"""The study of learned images, from settings to files."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn

from comparison.progress import threads
from comparison.reporting import write_csv, write_json
from distillation.data import RealData, load_images, split_off
from distillation.images import report
from distillation.images.baselines import VALIDATION_SHARE, best_rate, evaluate_baselines
from distillation.images.distiller import Learned, Row, learn
from distillation.images.evaluation import Lesson, Outcome, evaluate, lesson_of
from distillation.images.figures import write_figures
from distillation.images.outer import OuterObjective, make_objective
from distillation.images.settings import ImagesSettings
from distillation.images.starts import FRESH_SEEDS, Starts, main_factory, make_starts
from distillation.networks import make_factory, seeded
from etflayers.checks import require
from etflayers.distill import DistilledSet, write_png

ENLARGED = 3
RUNNING = 0.95  # weight of the past in the accuracy that the progress bar shows


def learn_images(settings: ImagesSettings, console: Console) -> list[report.SeedResult]:
    """Learn a set for each seed, train networks on it and on the baselines; write tables and figures.

    Raises:
        InvalidArgumentError: settings that cannot be run.
        MissingDependencyError: a package that the settings need is not installed.
        NonFiniteError: a training has diverged.
    """
    settings = settings.resolved
    settings.check()
    started = time.perf_counter()
    with threads(settings.threads):
        data = load_images(settings.comparison, settings.image_size)
        source = _source_data(settings, data)
        objective = make_objective(settings, data.num_classes)
        console.print(_announcement(settings, data), highlight=False)
        results = [_one_seed(settings, seed, data, source, objective, console) for seed in settings.seeds]

    folder = settings.folder
    rows = report.summary_rows(results)
    flat = [{name: value for name, value in row.items() if not name.endswith("_seeds")} for row in rows]
    files = [
        write_csv(folder / "summary.csv", flat),
        write_json(folder / "summary.json", {"settings": settings.fingerprint(), "rows": rows}),
        *write_figures(folder, results, objective.headline, data.name),
    ]
    console.print(report.summary_table(rows, objective, data.name))
    console.print(
        f"{time.perf_counter() - started:.0f} s. Written to {folder}: "
        f"{', '.join(path.name for path in files)}, and the sets",
        highlight=False,
    )
    return results


def _source_data(settings: ImagesSettings, data: RealData) -> RealData:
    """What the pretrained networks have been trained on."""
    if settings.source is None or settings.source == settings.data:
        return data
    size = data.shape[-1]
    source = load_images(replace(settings, data=settings.source).comparison, size)
    require(
        source.shape == data.shape and source.num_classes == data.num_classes,
        f"--source {settings.source} has images {source.shape} of {source.num_classes} classes, --data "
        f"{settings.data} {data.shape} of {data.num_classes}: one network must fit both",
    )
    return source


def _announcement(settings: ImagesSettings, data: RealData) -> str:
    return (
        f"{data.name}: {len(data.train)} images to learn from, {len(data.test)} to test on; "
        f"{settings.per_class * data.num_classes} images for {settings.inner_steps} steps of a "
        f"{settings.network} from {settings.initialization} initial states"
    )


def _one_seed(
    settings: ImagesSettings,
    seed: int,
    data: RealData,
    source: RealData,
    objective: OuterObjective,
    console: Console,
) -> report.SeedResult:
    starts = make_starts(settings, data, source, seed)
    learned = _learn_with_bar(settings, seed, data, starts, objective, console)
    distilled, folder = learned.distilled, settings.folder
    distilled.metadata = {"settings": settings.fingerprint(), "seed": seed}
    distilled.save(folder / f"seed{seed}.safetensors")
    write_png(folder / f"seed{seed}-images.png", _enlarged(distilled.images()))
    write_csv(folder / f"seed{seed}-history.csv", learned.history)
    file = folder / f"seed{seed}.json"
    record = {"settings": settings.fingerprint(), "evaluation": settings.evaluation()}
    outcomes = report.read_outcomes(file, record) if settings.resume else None
    if outcomes is None:
        outcomes = _evaluate_all(settings, seed, data, starts, objective, distilled)
    for outcome in outcomes:
        console.print(f"  {report.outcome_text(outcome)}", highlight=False, soft_wrap=True)
    result = report.SeedResult(seed, learned, outcomes)
    write_json(file, record | result.content())
    return result


def _learn_with_bar(
    settings: ImagesSettings,
    seed: int,
    data: RealData,
    starts: Starts,
    objective: OuterObjective,
    console: Console,
) -> Learned:
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[row]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(f"seed {seed}", row="", total=settings.outer_steps)
        running: float | None = None

        def progress(step: int, row: Row) -> None:
            nonlocal running
            newest = row[objective.headline]
            if running is None or math.isnan(running):  # a batch may have had nothing to measure
                running = newest
            elif not math.isnan(newest):
                running = RUNNING * running + (1 - RUNNING) * newest
            text = f"loss {row['loss']:.3f}, {objective.headline} {running:.1%}"
            bar.update(task, completed=step, row=text)

        path = settings.folder / "checkpoints" / f"seed{seed}.pt"
        learned = learn(settings, seed, data, starts, objective, path, progress)
    last = learned.history[-1]
    console.print(
        f"seed {seed}: {len(learned.history)} outer steps, {learned.seconds:.0f} s, last loss "
        f"{last['loss']:.3f}, {objective.headline} {last[objective.headline]:.1%} on its "
        f"{settings.outer_batch} training images",
        highlight=False,
        soft_wrap=True,
    )
    return learned


def _evaluate_all(
    settings: ImagesSettings,
    seed: int,
    data: RealData,
    starts: Starts,
    objective: OuterObjective,
    distilled: DistilledSet,
) -> list[Outcome]:
    """The set as it was learned, in other conditions, and the baselines."""
    lesson = lesson_of(distilled, settings)
    many, count = settings.evaluations, 1 if starts.single else settings.evaluations
    name = settings.network

    def outcome(
        training: str,
        lessons: list[Lesson],
        fresh: Callable[[int], nn.Module],
        number: int,
        network: str = name,
        **options: Any,
    ) -> Outcome:
        return evaluate(training, network, lessons, fresh, number, data, objective, **options)

    outcomes = [outcome("distilled", [lesson], starts.fresh, count, curves=True)]
    if settings.steps > 1:
        generator = torch.Generator().manual_seed(seed)
        orders = [lesson.in_other_order(generator) for _ in range(count)]
        mixtures = [lesson.in_other_batches(generator) for _ in range(count)]
        outcomes.append(outcome("distilled, other order", orders, starts.fresh, count, curves=True))
        outcomes.append(outcome("distilled, other batches", mixtures, starts.fresh, count, curves=True))
    if starts.single:
        factory = main_factory(settings, data)
        outcomes.append(
            outcome("distilled, fresh networks", [lesson], _unseen(factory, seed), many, curves=True)
        )
    _, validation = split_off(data.train, VALIDATION_SHARE)
    for other in settings.other_networks:
        fresh = _unseen(make_factory(other, data, head=settings.head, norm=settings.norm), seed)
        outcomes.append(outcome("distilled", [lesson], fresh, many, other))
        rate = best_rate([lesson], fresh, validation, settings, objective)
        outcomes.append(
            outcome("distilled, rate chosen", [lesson.with_rate(rate)], fresh, many, other, rate=rate)
        )
    if settings.baselines:
        outcomes += evaluate_baselines(settings, seed, data, starts.fresh, count, objective)
    return outcomes


def _enlarged(grid: Tensor) -> Tensor:
    """Every pixel as a square, or small images could not be seen."""
    return grid.repeat_interleave(ENLARGED, 1).repeat_interleave(ENLARGED, 2)


def _unseen(factory: Callable[[], nn.Module], seed: int) -> Callable[[int], nn.Module]:
    return lambda index: seeded(factory, FRESH_SEEDS + 1000 * seed + index)
