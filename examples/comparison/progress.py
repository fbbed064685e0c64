"""A training with a progress bar, on as many threads as it can use."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from comparison.data import ImageData, load
from comparison.evaluation import Row
from comparison.models import LABELS
from comparison.settings import HeadName, Settings
from comparison.training import Run, run_name, train


def train_with_bar(
    head: HeadName,
    seed: int,
    settings: Settings,
    images: ImageData,
    console: Console,
    on_row: Callable[[Row], None] = lambda row: None,
) -> Run:
    """Train a head, show how far it is, and call ``on_row`` after each epoch."""
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
                on_row(row)

        run = train(head, seed, settings, images, checkpoint, progress)
    console.print(
        f"{head} (seed {seed}): train accuracy {run.last['train_accuracy']:.2%}, "
        f"test accuracy {run.last['test_accuracy']:.2%}, {time.perf_counter() - started:.0f} s",
        highlight=False,
    )
    return run


def load_and_tell(settings: Settings, console: Console) -> tuple[ImageData, str]:
    """The data on the device of the settings, announced, and a title for what is trained on it."""
    images = load(settings).to(settings.torch_device)
    title = f"{LABELS.get(settings.model, settings.model)} on {images.name}"
    console.print(
        f"{title}: {len(images.train)} images to train, {len(images.test)} to test, "
        f"{images.num_classes} classes; epochs: {settings.epochs}, device: {settings.torch_device}"
    )
    return images, title


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let PyTorch use this many CPU threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
