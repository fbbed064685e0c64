"""A network with one of the methods, trained on noisy labels; it can be killed and continued."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from etflayers.checks import require
from lab.data import Split
from lab.files import Row
from lab.training import GlobalStreams, LossRun, descend, steps_of_an_epoch
from noise.data import NoisyData
from noise.measures import Samples, measure
from noise.methods import Knobs, MethodName, Network, make_head, make_loss, own_knobs
from noise.settings import KNOB_OPTIONS, NoiseSettings

EVALUATION_BATCH = 512
MOMENTUM = 0.9
PARTS = 5  # of the steps, each with a learning rate of its own


class Key(NamedTuple):
    """Which training; a trial chooses knobs, and does not look at the test set or at true labels."""

    eta: float
    method: MethodName
    seed: int
    knobs: Knobs
    trial: bool = False

    @property
    def name(self) -> str:
        own = "-".join(
            f"{name.replace('_', '-')}-{value:.6g}"
            for name, value in own_knobs(self.method, self.knobs).items()
            if value is not None
        )
        return f"{self.method}-eta{self.eta:g}-{own}-{'trial' if self.trial else 'seed'}{self.seed}"

    @property
    def row(self) -> Row:
        """As columns of a table; a knob that the method does not have stays empty."""
        own = own_knobs(self.method, self.knobs)
        return {"eta": self.eta, "method": self.method, "seed": self.seed, **own}


class NoiseRun(LossRun):
    """One training: batches come from (seed, epoch), so that a continued run draws the same ones.

    Attributes:
        samples: of each corrupted training sample how far it is from its class; empty before the end.
    """

    def __init__(self, key: Key, settings: NoiseSettings, noisy: NoisyData) -> None:
        self.key, self.settings, self.noisy, self.data = key, settings, noisy, noisy.data
        self.device = settings.torch_device
        classes = self.data.num_classes
        features = classes if settings.features is None else settings.features
        require(
            features >= classes - 1,
            f"--features {features} is too small for {classes} classes: a simplex ETF needs at least "
            f"{classes - 1}",
        )
        self.epochs = (key.trial and settings.tune_epochs) or settings.epochs
        torch.manual_seed(key.seed)
        head = make_head(key.method, features, classes, settings.scale)
        torch.manual_seed(key.seed)  # the body does not depend on what the head has drawn
        network = Network(settings.model, head, self.data.shape, settings.width, settings.depth)
        self.model = network.to(self.device)
        self.loss = make_loss(key.method, key.knobs.alpha)
        options = {"momentum": MOMENTUM, "weight_decay": key.knobs.weight_decay}
        self.optimizer = torch.optim.SGD(self.model.parameters(), key.knobs.lr, **options)
        self.steps_per_epoch = steps_of_an_epoch(len(self.data.train), settings.batch_size)
        self.samples: Samples = {}
        parts = {"model": self.model, "optimizer": self.optimizer, "random": GlobalStreams(self.device)}
        shared = {name: value for name, value in settings.fingerprint().items() if name not in KNOB_OPTIONS}
        own = {**self.data.fingerprint, **key.row, "trial": key.trial, "epochs": self.epochs}
        super().__init__(parts, shared | own, self.epochs * self.steps_per_epoch)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of the current epoch that are still to come."""
        train = self.data.train
        order, _ = self.shuffled(self.key.seed, len(train))
        for part in self.batch_slices(self.settings.batch_size):
            chosen = order[part].to(self.device)
            yield self.data.normalized(train.images[chosen]), train.targets[chosen]

    def rate(self) -> float:
        """The learning rate of this step: the fifths of the steps are those of the published schedule."""
        return self.key.knobs.lr * self.key.knobs.gamma ** (PARTS * self.step // self.total)

    def advance(self) -> Row | None:
        with self.clock():
            images, targets = self.next_batch()
            loss = self.loss(self.model(images, targets), targets)
            descend(self.optimizer, loss, self.rate())
            self.losses += float(loss.detach())
        epoch = self.finished_epoch()
        return None if epoch is None else self._row(epoch)

    def _row(self, epoch: int) -> Row:
        """What an epoch has come to; all but the loss only at the end, the test set in no trial."""
        row: Row = {**self.key.row, "epoch": epoch, "train_loss": self.mean_loss(self.key.name)}
        row["ms_per_step"] = 1e3 * self.seconds / self.steps_per_epoch
        self.seconds = 0.0
        if epoch == self.epochs:
            row["validation_accuracy"] = self.accuracy(self.noisy.validation)
            if not self.key.trial:
                measured, self.samples = measure(self.model.eval().head, self.features, self.noisy)
                row |= measured
        return row

    @torch.no_grad()
    def features(self, split: Split) -> Tensor:
        """Of all images of a split, ``(N, d)``, in eval mode."""
        self.model.eval()
        parts = split.images.split(EVALUATION_BATCH)
        return torch.cat([self.model.body(self.data.normalized(part)) for part in parts])

    @torch.no_grad()
    def accuracy(self, split: Split) -> float:
        """Share of the labels of a split that the network says."""
        logits = self.model.eval().head(self.features(split))
        return float((logits.argmax(1) == split.targets).double().mean())

    def state(self) -> dict[str, Any]:
        return super().state() | {"samples": self.samples}

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self.samples = state["samples"]
