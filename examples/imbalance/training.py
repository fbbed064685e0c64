"""A network with one of the methods, trained on a long tail; it can be killed and continued."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from etflayers.checks import require
from etflayers.metrics import (
    by_group,
    class_statistics,
    classifier_inputs,
    group_accuracy,
    read_classifier,
)
from imbalance.data import Kind, counts_of, groups_of
from imbalance.methods import KNOBS, Knobs, MethodName, make_head, make_objective, own_knobs
from imbalance.settings import LongTailSettings
from lab.data import ImageData, Split
from lab.files import Row
from lab.models import RESNETS, ResNet
from lab.schedules import rate_factor
from lab.training import GlobalStreams, LossRun, descend, steps_of_an_epoch

EVALUATION_BATCH = 512
# Options that say where knobs come from; a run is what it is by the knobs themselves.
KNOB_OPTIONS = ("scale", "weight_decay", "tau", "tune", "tune_seed", "tune_epochs")
KNOB_OPTIONS += ("scales", "weight_decays", "taus", "choices")
MEASURES = (
    "nc1_quotient",
    "nc2_gram_means",
    "nc3_cosine",
    "minority_collapse_weights",
    "minority_collapse_means",
)


class Key(NamedTuple):
    """Which training; a trial chooses knobs, and does not look at the test set."""

    kind: Kind
    ratio: float
    method: MethodName
    seed: int
    knobs: Knobs
    trial: bool = False

    @property
    def name(self) -> str:
        own = "-".join(
            f"{name.replace('_', '-')}-{getattr(self.knobs, name):g}" for name in KNOBS[self.method]
        )
        end = f"trial{self.seed}" if self.trial else f"seed{self.seed}"
        return f"{self.kind}-{self.ratio:g}-{self.method}-{own}-{end}"

    @property
    def row(self) -> Row:
        """As columns of a table; a knob that the method does not have stays empty."""
        place = {"kind": self.kind, "ratio": self.ratio, "method": self.method}
        return {**place, **own_knobs(self.method, self.knobs), "seed": self.seed}


class Network(nn.Module):
    """A small ResNet, a linear map to d features, a head."""

    def __init__(self, head: nn.Module, channels: int, width: float) -> None:
        super().__init__()
        widths, blocks, stem_stride = RESNETS["small"]
        widths = tuple(max(1, round(width * number)) for number in widths)
        self.body = ResNet(channels, 2, widths, blocks, stem_stride)
        self.body.classifier = nn.Linear(widths[-1], head.in_features, bias=False)
        self.head = head


class LongTailRun(LossRun):
    """One training: batches come from (seed, epoch), so that a continued run draws the same ones."""

    def __init__(self, key: Key, settings: LongTailSettings, data: ImageData) -> None:
        self.key, self.settings, self.data, self.device = key, settings, data, settings.torch_device
        require(
            settings.features >= data.num_classes - 1,
            f"--features {settings.features} is too small for {data.num_classes} classes: a simplex ETF "
            f"needs at least {data.num_classes - 1}",
        )
        self.epochs = (key.trial and settings.tune_epochs) or settings.epochs
        counts = counts_of(data)
        self.groups = groups_of(counts, key.kind)
        torch.manual_seed(key.seed)
        head = make_head(key.method, settings.features, counts, key.knobs)
        torch.manual_seed(key.seed)  # the body does not depend on what the head has drawn
        self.model = Network(head, data.shape[0], settings.width).to(self.device)
        self.objective = make_objective(key.method, head, counts, key.knobs)
        parameters, decay = self.model.parameters(), key.knobs.weight_decay
        self.optimizer = torch.optim.AdamW(parameters, settings.lr, weight_decay=decay)
        self.steps_per_epoch = steps_of_an_epoch(len(data.train), settings.batch_size)
        parts = {"model": self.model, "optimizer": self.optimizer, "random": GlobalStreams(self.device)}
        shared = {name: value for name, value in settings.fingerprint().items() if name not in KNOB_OPTIONS}
        own = {**data.fingerprint, **key.row, "trial": key.trial, "epochs": self.epochs}
        super().__init__(parts, shared | own, self.epochs * self.steps_per_epoch)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of the current epoch that are still to come."""
        train = self.data.train
        order, _ = self.shuffled(self.key.seed, len(train))
        for part in self.batch_slices(self.settings.batch_size):
            chosen = order[part].to(self.device)
            yield self.data.normalized(train.images[chosen]), train.targets[chosen]

    def advance(self) -> Row | None:
        with self.clock():
            images, targets = self.next_batch()
            loss = self.objective(self.model.body(images), targets)
            descend(self.optimizer, loss, self.settings.lr * rate_factor(self.step, self.total))
            self.losses += float(loss.detach())
        epoch = self.finished_epoch()
        if epoch is None:
            return None
        return self._row(epoch)

    def _row(self, epoch: int) -> Row:
        """What an epoch has come to; all but the loss only at the end, the test set in no trial."""
        row: Row = {**self.key.row, "epoch": epoch, "train_loss": self.mean_loss(self.key.name)}
        row["ms_per_step"] = 1e3 * self.seconds / self.steps_per_epoch
        self.seconds = 0.0
        if epoch == self.epochs:
            row |= self.accuracies("validation", self.data.held_out()[1])
            if not self.key.trial:
                row |= self.accuracies("test", self.data.test) | self.collapse()
        return row

    @torch.no_grad()
    def features(self, split: Split) -> Tensor:
        """Of all images of a split, ``(N, d)``, in eval mode."""
        self.model.eval()
        parts = split.images.split(EVALUATION_BATCH)
        return torch.cat([self.model.body(self.data.normalized(part)) for part in parts])

    @torch.no_grad()
    def accuracies(self, part: str, split: Split) -> Row:
        """Of all classes and of each group; every class counts once."""
        logits = self.model.eval().head(self.features(split))
        found = group_accuracy(logits, split.targets, self.data.num_classes, self.groups)
        return {f"{part}_accuracy_{group}": float(value) for group, value in found.items()}

    @torch.no_grad()
    def collapse(self) -> Row:
        """Neural collapse of the training set, of all and of each group: docs/understand/metrics.md."""
        train, head = self.data.train, self.model.head
        inputs = classifier_inputs(head, self.features(train))
        statistics = class_statistics(inputs, train.targets, self.data.num_classes, scatter="none")
        groups = {"all": torch.arange(self.data.num_classes), **self.groups}
        found = by_group(statistics, groups, classifier=read_classifier(head))
        return {f"{name}_{group}": float(found[group][name]) for group in found for name in MEASURES}
