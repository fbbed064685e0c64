"""The study of collapse on distilled data, from settings to files."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from comparison import checkpoints
from comparison.figures import draw_figures
from comparison.progress import threads
from comparison.reporting import write_csv, write_json
from distillation.collapse import report
from distillation.collapse.settings import CollapseSettings
from distillation.collapse.training import Row, TrainingSet, train_and_measure
from distillation.data import RealData, load_images
from distillation.kernel.learning import learn
from distillation.kernel.settings import KernelSettings
from distillation.settings import DistilHeadName
from etflayers.checks import require
from etflayers.distill import DistilledSet, random_samples

__all__ = ["CollapseSettings", "collapse_study"]


def collapse_study(settings: CollapseSettings, console: Console) -> list[Row]:
    """Train each head on each set for each seed; write tables and figures.

    Raises:
        InvalidArgumentError: settings that cannot be run, a file that does not fit the data.
        MissingDependencyError: a package that the settings need is not installed.
        NonFiniteError: a training has diverged.
    """
    settings = settings.resolved
    settings.check()
    started = time.perf_counter()
    rows: list[Row] = []
    with threads(settings.threads):
        data = load_images(settings.comparison, settings.image_size)
        for seed in settings.seeds:
            for training in training_sets(settings, seed, data, console):
                for head in settings.heads:
                    history = _kept(training, head, seed, data, settings, console)
                    rows += [
                        {
                            "set": training.name,
                            "images": len(training.inputs),
                            "head": head,
                            "seed": seed,
                            **row,
                        }
                        for row in history
                    ]
    folder = settings.folder
    summary = report.summary_rows(rows)
    title = f"{settings.network} on {data.name}, {settings.steps} steps"
    files = [
        write_csv(folder / "collapse.csv", rows),
        write_csv(folder / "summary.csv", summary),
        write_json(folder / "summary.json", {"settings": settings.fingerprint(), "summary": summary}),
        *draw_figures(
            folder,
            {
                "real-images": lambda _, title: report.curves_figure(rows, "train", title),
                "own-images": lambda _, title: report.curves_figure(rows, "own", title),
            },
            [],
            title,
        ),
    ]
    console.print(report.summary_table(summary, f"{title}: on real training and test images"))
    console.print(report.own_table(summary, f"{title}: on the images trained on"))
    console.print(
        f"{time.perf_counter() - started:.0f} s. Written to {folder}: "
        f"{', '.join(path.name for path in files)}",
        highlight=False,
    )
    return rows


def training_sets(
    settings: CollapseSettings, seed: int, data: RealData, console: Console
) -> list[TrainingSet]:
    """All real images, the distilled sets, and as many random real images as each of these has.

    A distilled set that has learning rates is there twice: for the steps of all the others, and for its own.
    """
    distilled: list[TrainingSet] = []
    for path in settings.sets:
        content = _read(path, data)
        distilled.append(TrainingSet.of(path.stem, content))
        taught = distilled[-1].taught(content)
        distilled += [] if taught is None else [taught]
    if not distilled:
        distilled = [_kernel_set(settings, seed, data, console)]
    sets = [TrainingSet("all real images", data.train.inputs, data.train.targets), *distilled]
    for per_class in sorted({len(training.inputs) // data.num_classes for training in distilled}):
        random = DistilledSet.from_data(
            data.train.inputs,
            data.train.targets,
            count=per_class,
            representatives=random_samples,
            num_classes=data.num_classes,
            generator=torch.Generator().manual_seed(seed),
        )
        sets.append(TrainingSet.of(f"{len(random.inputs)} random real images", random))
    return sets


def _read(path: Path, data: RealData) -> DistilledSet:
    distilled = DistilledSet.load(path, device=data.train.inputs.device)
    require(
        distilled.inputs.shape[1:] == data.train.inputs.shape[1:]
        and distilled.num_classes == data.num_classes,
        f"--sets {path}: {distilled.num_classes} classes of images {tuple(distilled.inputs.shape[1:])}, "
        f"--data has {data.num_classes} of {data.shape}",
    )
    return distilled


def _kernel_set(settings: CollapseSettings, seed: int, data: RealData, console: Console) -> TrainingSet:
    """A set learned by kernel regression, in a place where it can be found again."""
    chosen = KernelSettings(
        data=settings.data,
        data_dir=settings.data_dir,
        image_size=settings.image_size,
        classes=settings.classes,
        device=settings.device,
        outer_steps=settings.kernel_steps,
        resume=settings.resume,
    )
    name = f"kernel-{settings.per_class}-a-class-seed{seed}"
    learned = learn(
        chosen, settings.per_class, seed, data, settings.folder / "checkpoints" / f"{name}.pt"
    ).distilled
    learned.save(settings.folder / f"{name}.safetensors")
    console.print(f"learned {len(learned.inputs)} images by kernel regression, seed {seed}", highlight=False)
    return TrainingSet.of(f"{len(learned.inputs)} kernel images", learned)


def _kept(
    training: TrainingSet,
    head: DistilHeadName,
    seed: int,
    data: RealData,
    settings: CollapseSettings,
    console: Console,
) -> list[Row]:
    """The history of a training, from the file of an earlier run where there is one and it may be used."""
    name = f"{training.name.replace(',', '').replace(' ', '-')}-{head}-seed{seed}"
    path = settings.folder / "checkpoints" / f"{name}.pt"
    fingerprint = {
        **settings.fingerprint(),
        "head": head,
        "seed": seed,
        "images of the set": _digest(training),
    }
    if settings.resume and path.exists():
        history: list[Row] = checkpoints.load(path, fingerprint, settings.torch_device)["history"]
        return history
    started = time.perf_counter()
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(name, total=settings.steps)
        history = train_and_measure(
            training, head, seed, data, settings, lambda step: bar.update(task, completed=step)
        )
    checkpoints.save(path, {"fingerprint": fingerprint, "history": history})
    console.print(
        f"{training.name}, {head} head, seed {seed}: test accuracy {history[-1]['test_accuracy']:.2%}, "
        f"{time.perf_counter() - started:.0f} s",
        highlight=False,
    )
    return history


def _digest(training: TrainingSet) -> str:
    """What tells one set from another that has its name."""
    digest = hashlib.sha256()
    lesson = training.lesson
    for tensor in (training.inputs, training.labels, *([] if lesson is None else [lesson.rates])):
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
