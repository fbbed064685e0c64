"""Networks with different heads, trained on few images or many, and how far they collapse on the way."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comparison.data import ImageData, Split
from comparison.evaluation import measure
from comparison.heads import make_head
from comparison.settings import Settings as ComparisonSettings
from distillation.collapse.settings import CollapseSettings
from distillation.data import RealData
from distillation.images.evaluation import Lesson, teach
from distillation.networks import Network, make_factory, seeded
from distillation.settings import DistilHeadName
from etflayers.distill import DistilledSet
from etflayers.errors import NonFiniteError

Row = dict[str, Any]


@dataclass(frozen=True)
class TrainingSet:
    """What networks are trained on: images, and classes ``(n,)`` or probabilities ``(n, K)``.

    With a lesson, in the steps and at the rates that the images were learned for, and no others.
    """

    name: str
    inputs: Tensor
    labels: Tensor
    lesson: Lesson | None = None

    def taught(self, distilled: DistilledSet) -> TrainingSet | None:
        """The same with the lesson that comes with the set, if there is one."""
        learned_for = distilled.metadata.get("settings", {})
        if distilled.log_rates is None or not {"steps", "optimizer"} <= learned_for.keys():
            return None
        inputs, labels = (value.detach() for value in distilled.batches(learned_for["steps"]))
        lesson = Lesson(inputs, labels, distilled.rates.detach(), learned_for["optimizer"])
        return replace(self, name=f"{self.name}, own steps", lesson=lesson)

    @classmethod
    def of(cls, name: str, distilled: DistilledSet) -> TrainingSet:
        """The images of a distilled set. Labels that are no probabilities, those that a regression has
        learned, become the class of their largest entry."""
        labels = distilled.labels.detach()
        if labels.dtype.is_floating_point:
            sums = labels.sum(-1)
            if labels.min() < 0 or not torch.allclose(sums, torch.ones_like(sums)):
                labels = labels.argmax(-1)
        return cls(name, distilled.inputs.detach(), labels)

    @property
    def classes(self) -> Tensor:
        return self.labels if self.labels.ndim == 1 else self.labels.argmax(-1)


def train_and_measure(
    training: TrainingSet,
    head: DistilHeadName,
    seed: int,
    data: RealData,
    settings: CollapseSettings,
    progress: Callable[[int], None] = lambda step: None,
) -> list[Row]:
    """Train a network and return a row for each measured step.

    In eval mode, on three sets of images: ``own_...`` those that it is trained on, ``train_...`` and
    ``test_...`` real ones. NC4 on the test set is against the class means of the real training set.

    Raises:
        InvalidArgumentError: a network that does not fit the data.
        NonFiniteError: training has diverged.
    """
    network = make_network(head, seed, data, settings)
    parts = _parts(training, data)
    if training.lesson is not None:
        before = _measures(network, parts, training, head)
        after = _measures(teach(network, training.lesson), parts, training, head)
        return [{"step": 0, **before}, {"step": training.lesson.steps, **after}]
    optimizer = torch.optim.SGD(
        network.parameters(),
        settings.lr,
        momentum=settings.momentum,
        nesterov=settings.momentum > 0,
        weight_decay=settings.weight_decay,
    )
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    rows, measured = [], set(settings.measured_steps())
    for step in range(settings.steps + 1):
        if step in measured:
            rows.append({"step": step, **_measures(network, parts, training, head)})
            progress(step)
        if step == settings.steps:
            break
        optimizer.param_groups[0]["lr"] = settings.lr * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        if len(order) < min(settings.batch_size, len(training.inputs)):
            order = torch.randperm(len(training.inputs), generator=generator)
        chosen, order = order.tensor_split([settings.batch_size])
        chosen = chosen.to(training.inputs.device)
        network.train()
        optimizer.zero_grad()
        labels = training.labels[chosen]
        F.cross_entropy(network(training.inputs[chosen], labels), labels).backward()
        optimizer.step()
    return rows


def make_network(head: DistilHeadName, seed: int, data: RealData, settings: CollapseSettings) -> Network:
    """The network that the other studies train, its head replaced by one with the options of this study.

    One seed gives all heads the same body.
    """
    # Always of a linear head, or its random numbers would leave each head another body.
    network = seeded(make_factory(settings.network, data, width=settings.width, norm=settings.norm), seed)
    options = ComparisonSettings(
        head=(head,), normalize=settings.normalize, scale=settings.scale, rotation="haar"
    )
    features = network.head.in_features
    with torch.random.fork_rng():
        made = make_head(head, features, data.num_classes, options, seed)
    return Network(network.body, made).to(data.train.inputs.device)


def _parts(training: TrainingSet, data: RealData) -> dict[str, ImageData]:
    """The three sets of images as what the comparison of heads measures on: nothing is normalized again."""
    ones = torch.ones(1, 1, 1, 1, device=training.inputs.device)

    def whole(inputs: Tensor, targets: Tensor) -> ImageData:
        split = Split(inputs, targets)
        return ImageData(data.name, split, split, data.class_names, mean=0 * ones, deviation=ones)

    return {
        "own": whole(training.inputs, training.classes),
        "train": whole(data.train.inputs, data.train.targets),
        "test": whole(data.test.inputs, data.test.targets),
    }


def _measures(
    network: nn.Module, parts: dict[str, ImageData], training: TrainingSet, head: DistilHeadName
) -> Row:
    criterion = nn.CrossEntropyLoss()
    row: Row = {}
    centers = None
    try:
        for part, images in parts.items():
            measured = measure(
                network, criterion, images.train, images, centers=centers if part == "test" else None
            )
            row |= {f"{part}_{name}": value for name, value in measured.row.items()}
            centers = measured.statistics  # after "train", those that the test set is measured against
    except NonFiniteError as error:
        raise NonFiniteError(f"{training.name}, {head} head: {error}") from error
    return row
