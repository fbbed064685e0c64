"""One training of a network with one head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from etflayers import capture_features
from etflayers.checks import require
from etflayers.data import balanced_order
from etflayers.errors import ManifoldError, NonFiniteError
from etflayers.functional import nearest_etf
from etflayers.metrics import frame_distance, read_classifier
from lab.data import ImageData, load
from lab.data.sampling import affine_maps, mirrored, shifted, transformed
from lab.evaluation import Measures, measure
from lab.files import Row
from lab.heads import HeadName, head_of, targets_for
from lab.losses import make_criterion, make_optimizers, set_learning_rate, total_loss
from lab.models import LABELS, make_classifier
from lab.progress import bar
from lab.ranks import distributed, rank, share, with_shared_statistics, world_size
from lab.settings import Settings
from lab.training import (
    EpochRun,
    GlobalStreams,
    Progress,
    in_silence,
    reproducible,
    steps_of_an_epoch,
    synchronize,
)
from lab.views import Moment, is_kept, moment_of, require_room

FITTED = 0.999  # train accuracy at which a run counts as fitted


@dataclass(frozen=True)
class Trained:
    """A finished training: the history by epoch and what the figures show of its first and last moment.

    Attributes:
        head: what was trained.
        seed: of weights and batches.
        history: a row for each epoch, the first before training.
        snapshots: ``first_...`` and ``last_...``: class means and frame ``(K, d)``, and the cosine margins of
            the samples of the training and the test set, ascending ``(N,)``; with four classes also
            features ``(N, d)`` and targets of the training set.
        model: in its last state.
        recording: what the explorer shows of its epochs, if that was asked for.
    """

    head: HeadName
    seed: int
    history: list[Row]
    snapshots: dict[str, Tensor]
    model: nn.Module
    recording: list[Moment] = field(default_factory=list)

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
    """Stem of the files of a training."""
    return f"{head}-seed{seed}"


class Trainer(EpochRun):
    """Model, optimizers and position of one training.

    Everything random in an epoch, the order of the images and their augmentation, comes from a generator
    seeded by (seed, epoch): a continued run draws it again and skips the steps already taken.

    With ``recorded`` it keeps what the explorer shows of each epoch. A run that has begun so goes on so.
    """

    def __init__(
        self, head: HeadName, seed: int, settings: Settings, data: ImageData, *, recorded: bool = False
    ) -> None:
        self.settings, self.data, self.seed, self.device = settings, data, seed, settings.torch_device
        self.model = make_classifier(head, settings, data, seed).to(self.device)
        self.model = with_shared_statistics(self.model, self.device)
        self.network = distributed(self.model, self.device)
        self.optimizers = make_optimizers(self.model, settings)
        self.criterion = make_criterion(settings)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.amp == "fp16")
        self.steps_per_epoch = steps_of_an_epoch(len(data.train), settings.batch_size)
        self.snapshots: dict[str, Tensor] = {}
        self.recording: list[Moment] | None = [] if recorded else None
        if recorded:
            require_room(data.num_classes, read_classifier(head_of(self.model)).weight.shape[1])
        parts = {"model": self.model, "random": GlobalStreams(self.device)}
        parts |= {f"optimizer{number}": part for number, part in enumerate(self.optimizers)}
        if self.scaler.is_enabled():
            parts["scaler"] = self.scaler
        own = {**data.fingerprint, "head": head, "seed": seed, "ranks": world_size()}
        super().__init__(parts, settings.fingerprint() | own, settings.epochs * self.steps_per_epoch)
        # Dropout and the like draw the same numbers with every head, and other ones on every rank.
        torch.manual_seed(seed + (rank() << 32))

    @property
    def epoch(self) -> int:
        return self.step // self.steps_per_epoch

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of the current epoch that are still to come: of each the share of this rank."""
        generator = torch.Generator().manual_seed((self.seed << 32) + self.epoch)
        train, size, settings = self.data.train, self.settings.batch_size, self.settings
        if settings.balanced:
            order = balanced_order(train.targets, self.data.num_classes, generator=generator)
        else:
            order = torch.randperm(len(train), generator=generator)
        order = order.to(self.device)
        shifts = torch.randint(-settings.shift, settings.shift + 1, (len(train), 2), generator=generator)
        flips = torch.rand(len(train), generator=generator) < 0.5
        maps = affine_maps(len(train), settings.affine_size, generator)
        done = self.step % self.steps_per_epoch
        for start in range(done * size, self.steps_per_epoch * size, size):
            chosen = share(order[start : start + size])
            images = train.images[chosen]
            if settings.shift:
                images = shifted(images, shifts[chosen.cpu()].to(self.device))
            if settings.flip:
                images = mirrored(images, flips[chosen.cpu()].to(self.device))
            if settings.affine_size:
                images = transformed(images, maps[chosen.cpu()].to(self.device))
            yield self.data.normalized(images), train.targets[chosen]

    def begin(self) -> Row:
        return self.record(epoch=0)

    def advance(self) -> Row | None:
        with self.clock():
            images, targets = self.next_batch()
            set_learning_rate(self.optimizers, self.settings, self.step, self.total)
            self.update(images, targets)
        epoch = self.finished_epoch()
        if epoch is None:
            return None
        with self.clock():
            synchronize(self.device)
        return self.record(epoch)

    def update(self, images: Tensor, targets: Tensor) -> None:
        """One step of training."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        with (
            autocast(self.settings),
            targets_for(self.model, targets),
            capture_features(self.model, head_of(self.model)) as features,
        ):
            loss = total_loss(self.criterion, self.network(images), targets, features[0], self.settings)
        self.scaler.scale(loss).backward()
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()

    def record(self, epoch: int) -> Row:
        """Measure the model."""
        with autocast(self.settings):
            train = measure(self.model, self.criterion, self.data.train, self.data)
            test = measure(self.model, self.criterion, self.data.test, self.data, centers=train.statistics)
        row: Row = {"epoch": epoch}
        for part, measured in (("train", train), ("test", test)):
            row |= {f"{part}_{name}": value for name, value in measured.row.items()}
        drift = self._drift(train.statistics.means)
        if drift is not None:
            row["train_nc2_etf_drift_means"] = drift
        row["seconds"], self.seconds = round(self.seconds, 3), 0.0
        self._keep(train, test, ("first", "last") if epoch == 0 else ("last",))
        if self.recording is not None and is_kept(epoch, self.settings.epochs):
            frame = read_classifier(head_of(self.model)).weight
            self.recording.append(moment_of(epoch, train.statistics, frame, train.features, train.targets))
        return row

    def _drift(self, class_means: Tensor) -> float | None:
        """How far the ETF nearest to the class means has moved since the last epoch."""
        before = self.snapshots.get("last_class_means")
        if before is None or class_means.shape[1] < len(class_means) - 1:
            return None
        frames = nearest_etf(torch.stack((before.to(class_means), class_means)))
        return float(frame_distance(*frames))

    def _keep(self, train: Measures, test: Measures, moments: tuple[str, ...]) -> None:
        now = {
            "class_means": train.statistics.means,
            "frame": read_classifier(head_of(self.model)).weight.clone(),
            "train_margins": train.margins,
            "test_margins": test.margins,
        }
        if self.data.num_classes == 4:  # whose class means span a space that can be shown
            now |= {"features": train.features, "features_targets": train.targets}
        for moment in moments:
            self.snapshots |= {f"{moment}_{name}": tensor.cpu() for name, tensor in now.items()}

    def due(self, every: int) -> bool:
        return super().due(every) or self.step % self.steps_per_epoch == 0

    def state(self) -> dict[str, Any]:
        kept = {} if self.recording is None else {"recording": self.recording}
        return super().state() | {"snapshots": self.snapshots} | kept

    def restore(self, state: Mapping[str, Any]) -> None:
        require(
            self.recording is None or "recording" in state,
            "--resume --explorer: the first epochs of this run were not recorded: leave out --explorer, or "
            "train anew with --overwrite instead of --resume",
        )
        super().restore(state)
        if "recording" in state:
            self.recording = [_on_cpu(now) for now in state["recording"]]
        self.snapshots = {name: tensor.cpu() for name, tensor in state["snapshots"].items()}


def _on_cpu(now: Moment) -> Moment:
    return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in now.items()}


def train(
    head: HeadName,
    seed: int,
    settings: Settings,
    data: ImageData,
    *,
    recorded: bool = False,
    progress: Progress = in_silence,
) -> Trained:
    """Train a head, from its checkpoint where there is one and ``settings.resume`` asks for it.

    Raises:
        InvalidArgumentError: a checkpoint of another run, settings that do not fit the data, or epochs that
            were to be ``recorded`` and are over.
        NonFiniteError: training has diverged.
    """
    trainer = Trainer(head, seed, settings, data, recorded=recorded)
    try:
        with reproducible(trainer.device):
            trainer.finish(
                settings.checkpoint(run_name(head, seed)),
                resume=settings.resume,
                every=settings.checkpoint_every,
                progress=progress,
            )
    except (NonFiniteError, ManifoldError) as error:
        raise NonFiniteError(
            f"training of the {head} head diverged in epoch {trainer.epoch}: take a smaller --lr ({error})"
        ) from error
    return Trained(
        head, seed, trainer.history, trainer.snapshots, trainer.model, recording=trainer.recording or []
    )


def train_and_tell(
    head: HeadName,
    seed: int,
    settings: Settings,
    data: ImageData,
    console: Console,
    on_row: Callable[[Row], None] = lambda row: None,
    *,
    recorded: bool = False,
) -> Trained:
    """Train a head, show how far it is, and call ``on_row`` after each epoch."""
    with bar(
        console, f"{head} (seed {seed})", lambda row: f"test accuracy {row['test_accuracy']:.2%}"
    ) as shown:

        def progress(step: int, total: int, row: Row | None) -> None:
            shown(step, total, row)
            if row is not None:
                on_row(row)

        run = train(head, seed, settings, data, recorded=recorded, progress=progress)
    console.print(
        f"{head} (seed {seed}): train accuracy {run.last['train_accuracy']:.2%}, "
        f"test accuracy {run.last['test_accuracy']:.2%}, {shown.seconds:.0f} s",
        highlight=False,
    )
    return run


def load_and_tell(settings: Settings, console: Console) -> tuple[ImageData, str]:
    """The data on the device of the settings, announced, and a title for what is trained on it."""
    data = load(settings).to(settings.torch_device)
    title = f"{LABELS.get(settings.model, settings.model)} on {data.name}"
    console.print(
        f"{title}: {len(data.train)} images to train, {len(data.test)} to test, "
        f"{data.num_classes} classes; epochs: {settings.epochs}, device: {settings.torch_device}"
    )
    return data, title


def autocast(settings: Settings) -> torch.autocast:
    """Mixed precision as the settings want it."""
    dtype = torch.float16 if settings.amp == "fp16" else torch.bfloat16
    return torch.autocast(settings.torch_device.type, dtype=dtype, enabled=settings.amp != "off")
