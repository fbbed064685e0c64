"""What the images are learned for, and how it is measured: the outer objectives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from distillation.images.settings import ImagesSettings
from etflayers.checks import require

Measures = dict[str, float]


class OuterObjective(Protocol):
    """A loss of trained networks on real images, and the shares by which people judge it."""

    @property
    def headline(self) -> str:
        """The measure that is to become large."""
        ...

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """To be made small."""
        ...

    def measures(self, logits: Tensor, targets: Tensor) -> Measures:
        """Shares of the images, by name."""
        ...


@dataclass(frozen=True)
class Classify:
    """The network is to classify real images rightly."""

    headline: str = "accuracy"

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets)

    def measures(self, logits: Tensor, targets: Tensor) -> Measures:
        return {"accuracy": _share(logits.argmax(1) == targets)}


@dataclass(frozen=True)
class Misclassify:
    """The network is to take the attacked class for the target class, and to classify the others rightly.

    Reference:
        Wang, Zhu, Torralba, Efros (2018), arXiv 1811.10959, on malicious data poisoning.
    """

    attacked: int
    target: int
    headline: str = "attack"

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets.masked_fill(targets == self.attacked, self.target))

    def measures(self, logits: Tensor, targets: Tensor) -> Measures:
        found, victims = logits.argmax(1), targets == self.attacked
        return {
            "attack": _share(found[victims] == self.target),
            "others": _share((found == targets)[~victims]),
            "accuracy": _share(found == targets),
        }


def make_objective(settings: ImagesSettings, num_classes: int) -> OuterObjective:
    """The objective that the settings name.

    Raises:
        InvalidArgumentError: a class that the data do not have.
    """
    if settings.outer == "classify":
        return Classify()
    for name in ("attacked", "target"):
        value = getattr(settings, name)
        require(0 <= value < num_classes, f"--{name} must be a class in [0, {num_classes}), got {value}")
    return Misclassify(settings.attacked, settings.target)


def _share(hits: Tensor) -> float:
    """NaN if there are none to hit."""
    return hits.double().mean().item()
