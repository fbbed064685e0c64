"""What networks that train on the images are to do with real ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from distillation.images_settings import ImagesSettings
from etflayers.checks import require
from etflayers.distill.evaluation import Measures, accuracy, accuracy_by_class


@dataclass(frozen=True)
class Objective:
    """Classify all real images rightly, or all but those of a class.

    Attributes:
        attacked: a class to be taken for ``target``; ``None``: there is none.
        target: another class.

    Reference:
        Wang, Zhu, Torralba, Efros (2018), arXiv 1811.10959, on malicious data poisoning.
    """

    attacked: int | None = None
    target: int = 0

    @classmethod
    def of(cls, settings: ImagesSettings, num_classes: int) -> Objective:
        """That of the settings.

        Raises:
            InvalidArgumentError: a class that the data do not have.
        """
        if settings.outer == "classify":
            return cls()
        for name, value in settings.values("attacked", "target").items():
            require(0 <= value < num_classes, f"--{name} must be a class in [0, {num_classes}), got {value}")
        return cls(settings.attacked, settings.target)

    @property
    def headline(self) -> str:
        """The measure that is to become large."""
        return "accuracy" if self.attacked is None else "attack"

    def wanted(self, targets: Tensor) -> Tensor:
        """What the classes are to be taken for."""
        return (
            targets if self.attacked is None else targets.masked_fill(targets == self.attacked, self.target)
        )

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, self.wanted(targets))

    def judge(self, logits: Tensor, targets: Tensor) -> Measures:
        """The shares by which people judge it; the first is the headline.

        Of an attack: ``attack`` of the attacked class and ``others`` of the rest are as they were learned to
        be, ``modified`` of all, and ``accuracy`` is the share of all that is taken for what it is.
        """
        if self.attacked is None:
            return accuracy(logits, targets)
        victims, wanted = targets == self.attacked, self.wanted(targets)
        shares = {"attack": victims, "others": ~victims}
        named = {name: accuracy(logits[part], wanted[part])["accuracy"] for name, part in shares.items()}
        named |= {"modified": accuracy(logits, wanted)["accuracy"]}
        return named | accuracy(logits, targets)

    def judge_fully(self, logits: Tensor, targets: Tensor) -> Measures:
        """The same and, of an attack, the share of each class that is still taken for what it is."""
        measures = self.judge(logits, targets)
        return measures if self.attacked is None else measures | accuracy_by_class(logits, targets)
