"""What the studies of distilled data share: options, the set before it is learned, and the outer loop."""

from __future__ import annotations

import hashlib
import json
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from etflayers.distill import DistilledSet, Lesson, kmeans_centers, partial_means, random_samples
from etflayers.distill.lessons import UpdateRule
from lab.data import ImageData
from lab.data.sampling import endless_batches
from lab.files import Row
from lab.networks import NetworkName, NormName
from lab.options import Count, Flag, Free
from lab.settings import DataSettings
from lab.training import Run, Stream

DistilHeadName = Literal["linear", "standard", "fixed", "nearest"]
StartName = Literal["noise", "real", "kmeans", "means"]
REPRESENTATIVES = {"real": random_samples, "kmeans": kmeans_centers, "means": partial_means}


@dataclass(frozen=True, kw_only=True)
class DistillationSettings(DataSettings):
    """Data, seeds and places: the same for every study."""

    small: ClassVar[dict[str, Any]] = {}  # what --quick makes of the other options

    threads: Count = 1
    """CPU threads: networks this small gain little from a second one."""
    checkpoint_every: Free[Count] = 20
    """Outer steps between checkpoints."""
    quick: Free[Flag] = False
    """Under a minute: digits, small networks, few steps; all else as given."""

    @property
    def resolved(self) -> Any:
        """What is run: these settings, with those of `--quick`."""
        return replace(self, **self.small) if self.quick else self


@dataclass(frozen=True, kw_only=True)
class NetworkSettings(DistillationSettings):
    """The network that is trained on the images."""

    network: NetworkName = "lenet"
    """lenet: that of Wang et al. (2018); convnet: three blocks of convolution, norm, ReLU and average
    pooling; mlp: one hidden layer; linear."""
    width: Count | None = None
    """Channels of the convnet (default: 32), hidden units of the mlp (default: 128)."""
    norm: NormName = "instance"
    """Normalization in the convnet. batch: with averages over all steps, for the evaluation."""


def first_set(
    start: str, per_class: int, data: ImageData, generator: torch.Generator, **options: Any
) -> DistilledSet:
    """The set before it is learned: noise, real images, class means or centers of k-means."""
    options |= {"per_class": per_class, "num_classes": data.num_classes, "generator": generator}
    options |= data.normalization
    if start == "noise":
        return DistilledSet.from_noise(data.shape, **options).to(data.device)
    train, options["representatives"] = data.train, REPRESENTATIVES[start]
    return DistilledSet.from_data(train.images, train.targets, **options).to(data.device)


def inner_loss(model: Callable[..., Tensor], images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, of a model that is given the labels too: the nearest-ETF head learns from them."""
    return F.cross_entropy(model(images, labels), labels)


def cosine(step: int, steps: int) -> float:
    """The factor to a rate that falls to 0."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def random_lesson(
    inputs: Tensor, labels: Tensor, size: int, steps: int, optimizer: str | UpdateRule, seed: int
) -> Lesson:
    """Random batches, each image once in every pass, and a rate that falls from 1 to 0."""
    batches = endless_batches(len(inputs), size, torch.Generator().manual_seed(seed))
    numbers = torch.stack(list(islice(batches, steps))).to(inputs.device)
    rates = torch.tensor([cosine(step, steps) for step in range(steps)], dtype=torch.float64)
    return Lesson(inputs, labels, numbers, rates, optimizer)


def digest(content: Any) -> str:
    """What tells one request from another, for the name of a file."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


class OuterRun(Run):
    """A set that is learned step by step, by Adam.

    Args:
        distilled: the set before it is learned.
        groups: of its parameters, each with the learning rate at the start, which falls to 0 as a cosine.
        steps: how many outer steps there will be.
        generator: of all that is random.
        fingerprint: what decides the numbers.
        parts: what else changes.
    """

    def __init__(
        self,
        distilled: DistilledSet,
        groups: list[dict[str, Any]],
        steps: int,
        generator: torch.Generator,
        fingerprint: Mapping[str, Any],
        **parts: Any,
    ) -> None:
        self.distilled, self.generator = distilled, generator
        self.optimizer = torch.optim.Adam(groups)
        self.rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.device = distilled.inputs.device
        parts |= {"distilled": distilled, "optimizer": self.optimizer, "generator": Stream(generator)}
        super().__init__(parts, fingerprint, steps)

    def advance(self) -> Row:
        with self.clock():
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * cosine(self.step, self.total)
            self.optimizer.zero_grad()
            return self.update()

    @abstractmethod
    def update(self) -> Row:
        """Find the gradients and take a step of the optimizer."""
