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
from comparison.evaluation import Measures, Row, measure
from comparison.heads import captured_features, head_of, make_classifier, targets_for
from comparison.losses import make_criterion, total_loss
from comparison.optimizers import make_optimizers, set_learning_rate
from comparison.ranks import distributed, gathered, rank, share, with_shared_statistics, world_size
from comparison.sampling import epoch_order
from comparison.settings import HeadName, Settings
from etflayers.checks import require
from etflayers.errors import ManifoldError, NonFiniteError
from etflayers.functional import nearest_etf
from etflayers.metrics import frame_distance, read_classifier

FITTED = 0.999  # train accuracy at which a run counts as fitted

Progress = Callable[[int, int, "Row | None"], None]


@dataclass(frozen=True)
class Run:
    """A finished training: the history by epoch and what the figures show of its first and last moment.

    Attributes:
        head: what was trained.
        seed: of weights and batches.
        history: a row for each epoch, the first before training.
        snapshots: ``first_...`` and ``last_...``: class means and frame ``(K, d)``, and the cosine margins of
            the samples of the training and the test set, ascending ``(N,)``; with four classes also
            features ``(N, d)`` and targets of the training set.
        model: in its last state.
    """

    head: HeadName
    seed: int
    history: list[Row]
    snapshots: dict[str, Tensor]
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


class Trainer:
    """Model, optimizers and position of one run.

    Everything random in an epoch, the order of the images and their augmentation, comes from a generator
    seeded by (seed, epoch): a continued run draws it again and skips the steps already taken.
    """

    def __init__(self, head: HeadName, seed: int, settings: Settings, data: ImageData) -> None:
        self.settings = settings
        self.data = data
        self.seed = seed
        self.device = settings.torch_device
        self.model = make_classifier(head, settings, data, seed).to(self.device)
        self.model = with_shared_statistics(self.model, self.device)
        self.network = distributed(self.model, self.device)
        self.optimizers = make_optimizers(self.model, settings)
        self.criterion = make_criterion(settings)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.amp == "fp16")
        self.fingerprint = settings.fingerprint() | {
            "head": head,
            "seed": seed,
            "classes": data.num_classes,
            "ranks": world_size(),
        }
        self.steps_per_epoch = len(data.train) // settings.batch_size
        require(
            self.steps_per_epoch > 0,
            f"--batch-size {settings.batch_size} is more than the {len(self.data.train)} training images",
        )
        self.epoch, self.step, self.seconds = 0, 0, 0.0
        self.history: list[Row] = []
        self.snapshots: dict[str, Tensor] = {}
        # Dropout and the like draw the same numbers with every head, and other ones on every rank.
        torch.manual_seed(seed + (rank() << 32))

    @property
    def total_steps(self) -> int:
        return self.settings.epochs * self.steps_per_epoch

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of the current epoch that are still to come: of each the share of this rank."""
        generator = torch.Generator().manual_seed((self.seed << 32) + self.epoch)
        train, size = self.data.train, self.settings.batch_size
        order = epoch_order(
            train.targets.cpu(), self.data.num_classes, generator, balanced=self.settings.balanced
        ).to(self.device)
        shifts = torch.randint(
            -self.settings.shift, self.settings.shift + 1, (len(train), 2), generator=generator
        )
        flips = torch.rand(len(train), generator=generator) < 0.5
        for start in range(self.step * size, self.steps_per_epoch * size, size):
            chosen = share(order[start : start + size])
            images = train.images[chosen]
            if self.settings.shift:
                images = shifted(images, shifts[chosen.cpu()].to(self.device))
            if self.settings.flip:
                mirror = flips[chosen.cpu()].to(self.device).view(-1, 1, 1, 1)
                images = torch.where(mirror, images.flip(-1), images)
            yield self.data.normalized(images), train.targets[chosen]

    def update(self, images: Tensor, targets: Tensor) -> None:
        """One step of training."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        with (
            autocast(self.settings),
            targets_for(self.model, targets),
            captured_features(self.model) as features,
        ):
            loss = total_loss(self.criterion, self.network(images), targets, features[0], self.settings)
        self.scaler.scale(loss).backward()
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()

    def record(self) -> Row:
        """Measure the model and add a row to the history."""
        with autocast(self.settings):
            train = measure(self.model, self.criterion, self.data.train, self.data)
            test = measure(self.model, self.criterion, self.data.test, self.data, centers=train.statistics)
        row: Row = {"epoch": self.epoch}
        for part, measured in (("train", train), ("test", test)):
            row |= {f"{part}_{name}": value for name, value in measured.row.items()}
        drift = self._drift(train.statistics.means)
        if drift is not None:
            row["train_nc2_etf_drift_means"] = drift
        row["seconds"] = round(self.seconds, 3)
        self.history.append(row)
        self.seconds = 0.0
        self._keep(train, test)
        return row

    def _drift(self, class_means: Tensor) -> float | None:
        """How far the ETF nearest to the class means has moved since the last epoch."""
        before = self.snapshots.get("last_class_means")
        if before is None or class_means.shape[1] < len(class_means) - 1:
            return None
        frames = nearest_etf(torch.stack((before.to(class_means), class_means)))
        return float(frame_distance(*frames))

    def _keep(self, train: Measures, test: Measures) -> None:
        now = {
            "class_means": train.statistics.means,
            "frame": read_classifier(head_of(self.model)).weight.clone(),
            "train_margins": train.margins,
            "test_margins": test.margins,
        }
        if self.data.num_classes == 4:  # whose class means span a space that can be shown
            now |= {"features": train.answers.features, "features_targets": train.answers.targets}
        for when in ("first", "last") if self.epoch == 0 else ("last",):
            self.snapshots |= {f"{when}_{name}": tensor.cpu() for name, tensor in now.items()}

    def state(self) -> dict[str, Any]:
        return {
            "fingerprint": self.fingerprint,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "random": gathered(checkpoints.random_state(self.device)),
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.seconds,
            "history": self.history,
            "snapshots": self.snapshots,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        checkpoints.set_random_state(state["random"][rank()], self.device)
        self.epoch, self.step, self.seconds = state["epoch"], state["step"], state["seconds"]
        self.history = state["history"]
        self.snapshots = {name: tensor.cpu() for name, tensor in state["snapshots"].items()}


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
            if rank() == 0:
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
    return Run(head, seed, trainer.history, trainer.snapshots, trainer.model)


def train_epoch(trainer: Trainer, checkpoint: Path, progress: Progress) -> None:
    """Finish the current epoch, with checkpoints on the way and at the end."""
    trainer.model.train()
    before = trainer.epoch * trainer.steps_per_epoch
    started = time.perf_counter()
    for images, targets in trainer.batches():
        set_learning_rate(trainer.optimizers, trainer.settings, before + trainer.step, trainer.total_steps)
        trainer.update(images, targets)
        trainer.step += 1
        unfinished = trainer.step < trainer.steps_per_epoch
        if unfinished and trainer.step % trainer.settings.checkpoint_every == 0:
            synchronize(trainer.device)
            now = time.perf_counter()
            trainer.seconds += now - started
            started = now
            save(trainer, checkpoint)
        progress(before + trainer.step, trainer.total_steps, None)
    synchronize(trainer.device)
    trainer.seconds += time.perf_counter() - started
    trainer.epoch, trainer.step = trainer.epoch + 1, 0
    row = trainer.record()
    save(trainer, checkpoint)
    progress(before + trainer.steps_per_epoch, trainer.total_steps, row)


def save(trainer: Trainer, checkpoint: Path) -> None:
    """Write the state of the run, which all ranks gather, from the first of them."""
    state = trainer.state()
    if rank() == 0:
        checkpoints.save(checkpoint, state)


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
