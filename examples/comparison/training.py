"""One training of one head, which can be killed at any moment and continued to the same numbers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from comparison import checkpoints
from comparison.data import ImageData
from comparison.evaluation import centred_cosines, etf_distance, evaluate
from comparison.heads import head_of, make_classifier, targets_for
from comparison.optimizers import make_optimizers, set_learning_rate
from comparison.settings import HeadName, Settings
from etflayers import DotRegressionLoss
from etflayers.errors import ManifoldError, NonFiniteError, require

FITTED = 0.999  # train accuracy at which a run counts as fitted

Row = dict[str, float]  # what is known of one epoch
Progress = Callable[[int, int, "Row | None"], None]


@dataclass(frozen=True)
class Run:
    """A finished training: the history by epoch and what the figures show of its first and last moment."""

    head: HeadName
    seed: int
    history: list[Row]
    cosines: dict[str, Tensor]
    model: nn.Module

    @property
    def name(self) -> str:
        return run_name(self.head, self.seed)

    @property
    def last(self) -> Row:
        return self.history[-1]

    @property
    def epochs_to_fit(self) -> int | None:
        return next((int(row["epoch"]) for row in self.history if row["train_accuracy"] >= FITTED), None)


def run_name(head: str, seed: int) -> str:
    """Stem of the files of a run."""
    return f"{head}-seed{seed}"


def make_criterion(settings: Settings) -> nn.Module:
    """Cross-entropy, or dot regression towards logits as large as the scale of the head."""
    return nn.CrossEntropyLoss() if settings.loss == "ce" else DotRegressionLoss(settings.logit_scale)


class Trainer:
    """Model, optimisers and position of one run.

    Everything random in an epoch, the order of the images and their augmentation, comes from a generator
    seeded by (seed, epoch): a continued run draws it again and skips the steps already taken.
    """

    def __init__(self, head: HeadName, seed: int, settings: Settings, data: ImageData) -> None:
        self.settings = settings
        self.data = data
        self.seed = seed
        self.device = settings.torch_device
        self.model = make_classifier(head, settings, data, seed).to(self.device)
        self.optimizers = make_optimizers(self.model, settings)
        self.criterion = make_criterion(settings)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.amp == "fp16")
        self.fingerprint = settings.fingerprint() | {"head": head, "seed": seed, "classes": data.num_classes}
        self.steps_per_epoch = len(data.train) // settings.batch_size
        require(
            self.steps_per_epoch > 0,
            f"--batch-size {settings.batch_size} is more than the {len(data.train)} training images",
        )
        self.epoch, self.step, self.seconds = 0, 0, 0.0
        self.history: list[Row] = []
        self.cosines: dict[str, Tensor] = {}
        torch.manual_seed(seed)  # dropout and the like draw the same numbers with every head

    @property
    def total_steps(self) -> int:
        return self.settings.epochs * self.steps_per_epoch

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of the current epoch that are still to come."""
        generator = torch.Generator().manual_seed((self.seed << 32) + self.epoch)
        train, size = self.data.train, self.settings.batch_size
        order = torch.randperm(len(train), generator=generator).to(self.device)
        shifts = torch.randint(
            -self.settings.shift, self.settings.shift + 1, (len(train), 2), generator=generator
        )
        flips = torch.rand(len(train), generator=generator) < 0.5
        for start in range(self.step * size, self.steps_per_epoch * size, size):
            chosen = order[start : start + size]
            images = train.images[chosen]
            if self.settings.shift:
                images = shifted(images, shifts[chosen.cpu()].to(self.device))
            if self.settings.flip:
                mirror = flips[chosen.cpu()].to(self.device).view(-1, 1, 1, 1)
                images = torch.where(mirror, images.flip(-1), images)
            yield self.data.normalised(images), train.targets[chosen]

    def update(self, images: Tensor, targets: Tensor) -> None:
        """One step of training."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        with autocast(self.settings), targets_for(self.model, targets):
            loss = self.criterion(self.model(images), targets)
        self.scaler.scale(loss).backward()
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()

    def record(self) -> Row:
        """Measure the model and add a row to the history."""
        with autocast(self.settings):
            train = evaluate(self.model, self.criterion, self.data.train, self.data)
            test = evaluate(self.model, self.criterion, self.data.test, self.data)
        row = {
            "epoch": self.epoch,
            "train_loss": train.loss,
            "train_accuracy": train.accuracy,
            "test_loss": test.loss,
            "test_accuracy": test.accuracy,
            "etf_distance": etf_distance(train.class_means),
            "seconds": round(self.seconds, 3),
        }
        self.history.append(row)
        when = "first" if self.epoch == 0 else "last"
        self.cosines[f"{when}_class_means"] = centred_cosines(train.class_means)
        self.cosines[f"{when}_frame"] = centred_cosines(head_of(self.model).weight)
        self.seconds = 0.0
        return row

    def state(self) -> dict[str, Any]:
        return {
            "fingerprint": self.fingerprint,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "random": checkpoints.random_state(self.device),
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.seconds,
            "history": self.history,
            "cosines": self.cosines,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        checkpoints.set_random_state(state["random"], self.device)
        self.epoch, self.step, self.seconds = state["epoch"], state["step"], state["seconds"]
        self.history = state["history"]
        self.cosines = {name: tensor.cpu() for name, tensor in state["cosines"].items()}


def train(
    head: HeadName, seed: int, settings: Settings, data: ImageData, checkpoint: Path, progress: Progress
) -> Run:
    """Train a head, from the checkpoint where there is one and ``settings.resume`` asks for it.

    Args:
        head: which one.
        seed: of weights and batches.
        settings: of the comparison.
        data: on the device of the settings.
        checkpoint: file for the state of the run.
        progress: called with the steps taken, the steps in all and, after an epoch, its row.

    Raises:
        InvalidArgumentError: a checkpoint of another run, or settings that do not fit the data.
        NonFiniteError: training has diverged.
    """
    trainer = Trainer(head, seed, settings, data)
    with reproducible(trainer.device):
        if settings.resume and checkpoint.exists():
            trainer.restore(checkpoints.load(checkpoint, trainer.fingerprint, trainer.device))
            progress(trainer.epoch * trainer.steps_per_epoch + trainer.step, trainer.total_steps, None)
        else:
            # What an earlier run left here is over: a kill before the first checkpoint must not revive it.
            checkpoint.unlink(missing_ok=True)
            progress(0, trainer.total_steps, trainer.record())
        while trainer.epoch < settings.epochs:
            try:
                train_epoch(trainer, checkpoint, progress)
            except (NonFiniteError, ManifoldError) as error:
                raise NonFiniteError(
                    f"training of the {head} head diverged in epoch {trainer.epoch}: "
                    f"take a smaller --lr ({error})"
                ) from error
    return Run(head, seed, trainer.history, trainer.cosines, trainer.model)


def train_epoch(trainer: Trainer, checkpoint: Path, progress: Progress) -> None:
    """Finish the current epoch, with checkpoints on the way and at the end."""
    trainer.model.train()
    before = trainer.epoch * trainer.steps_per_epoch
    started = time.perf_counter()
    for images, targets in trainer.batches():
        set_learning_rate(
            trainer.optimizers, trainer.settings.learning_rate, before + trainer.step, trainer.total_steps
        )
        trainer.update(images, targets)
        trainer.step += 1
        unfinished = trainer.step < trainer.steps_per_epoch
        if unfinished and trainer.step % trainer.settings.checkpoint_every == 0:
            synchronize(trainer.device)
            now = time.perf_counter()
            trainer.seconds += now - started
            started = now
            checkpoints.save(checkpoint, trainer.state())
        progress(before + trainer.step, trainer.total_steps, None)
    synchronize(trainer.device)
    trainer.seconds += time.perf_counter() - started
    trainer.epoch, trainer.step = trainer.epoch + 1, 0
    row = trainer.record()
    checkpoints.save(checkpoint, trainer.state())
    progress(before + trainer.steps_per_epoch, trainer.total_steps, row)


def autocast(settings: Settings) -> torch.autocast:
    """Mixed precision as the settings want it."""
    dtype = torch.float16 if settings.amp == "fp16" else torch.bfloat16
    return torch.autocast(settings.torch_device.type, dtype=dtype, enabled=settings.amp != "off")


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that the clock shows work done and not work asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def shifted(images: Tensor, shifts: Tensor) -> Tensor:
    """Move each image ``(N, C, H, W)`` by its shift ``(N, 2)`` down and right; what comes in is black."""
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=images.device) - shifts[:, :1]
    columns = torch.arange(width, device=images.device) - shifts[:, 1:]
    inside = ((rows >= 0) & (rows < height)).unsqueeze(2) & ((columns >= 0) & (columns < width)).unsqueeze(1)
    number = torch.arange(len(images), device=images.device).view(-1, 1, 1)
    moved = images.permute(0, 2, 3, 1)[
        number, rows.clamp(0, height - 1).unsqueeze(2), columns.clamp(0, width - 1).unsqueeze(1)
    ]
    return (moved * inside.unsqueeze(-1)).permute(0, 3, 1, 2)


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """On CUDA choose deterministic kernels where there are any; the CPU's are deterministic as they are."""
    before = torch.are_deterministic_algorithms_enabled()
    if device.type == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
