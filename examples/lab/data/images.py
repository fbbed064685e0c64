"""Images in memory: a training set and a test set that never depend on the seed of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from etflayers.checks import require
from etflayers.data import class_subset

TEST_SHARE = VALIDATION_SHARE = 0.2


@dataclass(frozen=True)
class Split:
    """Images ``(N, C, H, W)``, bytes or what a network takes, and their classes ``(N,)``."""

    images: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device) -> Split:
        return Split(self.images.to(device), self.targets.to(device))

    def where(self, chosen: Tensor) -> Split:
        """The images of these numbers, or those where a mask is true."""
        return Split(self.images[chosen], self.targets[chosen])

    def resized(self, side: int) -> Split:
        """The same images with ``side`` pixels a side."""
        if self.images.shape[-2:] == (side, side):
            return self
        options = {"mode": "bilinear", "antialias": True}
        images = F.interpolate(self.images.float(), (side, side), **options)
        images = images if self.images.is_floating_point() else images.round().to(torch.uint8)
        return Split(images, self.targets)

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images drawn with replacement, by a generator on the CPU."""
        chosen = torch.randint(len(self), (size,), generator=generator).to(self.targets.device)
        return self.images[chosen], self.targets[chosen]


@dataclass(frozen=True)
class ImageData:
    """A training set and a test set.

    Attributes:
        name: of the data.
        train: all that is learned from.
        test: looked at to report, never to choose.
        class_names: one for each of the K classes.
        mean: of the training pixels, between 0 and 255, for each color ``(1, C, 1, 1)``.
        deviation: likewise.
        fingerprint: what tells these data from others of their name; a run may be continued on them alone.
        validation: to choose by, where the data bring it; see :meth:`held_out`.
    """

    name: str
    train: Split
    test: Split
    class_names: tuple[str, ...]
    mean: Tensor
    deviation: Tensor
    fingerprint: dict[str, Any]
    validation: Split | None = None

    @classmethod
    def of(
        cls,
        name: str,
        train: Split,
        test: Split,
        class_names: tuple[str, ...],
        validation: Split | None = None,
    ) -> ImageData:
        """With the mean and deviation of the training pixels, and the fingerprint of all."""
        colors = [torch.std_mean(train.images[:, color].double()) for color in range(train.images.shape[1])]
        deviation, mean = (torch.stack(part).float().view(1, -1, 1, 1) for part in zip(*colors, strict=True))
        parts = [part for part in (train, test, validation) if part is not None]
        fingerprint = {
            "class names": list(class_names),
            "shape of the images": list(train.images.shape[1:]),
            "number of images": [len(part) for part in parts],
            "content of the images": _digest(parts),
        }
        return cls(name, train, test, class_names, mean, deviation.clamp(min=1), fingerprint, validation)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one image: colors, height, width."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    @property
    def device(self) -> torch.device:
        return self.train.targets.device

    @property
    def normalization(self) -> dict[str, Tensor]:
        """What takes inputs back to pixels between 0 and 1, as a distilled set has it."""
        return {"mean": self.mean.flatten() / 255, "std": self.deviation.flatten() / 255}

    def mapped(self, change: Callable[[Split], Split], **more: Any) -> ImageData:
        """The same with every split changed."""
        parts = {name: getattr(self, name) for name in ("train", "test", "validation")}
        changed = {name: change(part) for name, part in parts.items() if part is not None}
        return replace(self, **changed, **more)

    def to(self, device: torch.device) -> ImageData:
        moved = {"mean": self.mean.to(device), "deviation": self.deviation.to(device)}
        return self.mapped(lambda split: split.to(device), **moved)

    def normalized(self, images: Tensor) -> Tensor:
        """Pixels of mean 0 and deviation 1 over the training set, channels last, which suits a CPU best.

        Images that are no bytes any more are normalized already.
        """
        pixels = images if images.is_floating_point() else (images.float() - self.mean) / self.deviation
        return pixels.contiguous(memory_format=torch.channels_last)

    def as_inputs(self) -> ImageData:
        """The same with images as networks take them: normalized."""
        return self.mapped(lambda split: Split(self.normalized(split.images).contiguous(), split.targets))

    def resized(self, side: int | None) -> ImageData:
        """The same with images of a square of this side; ``None``: as they are."""
        return self if side is None else self.mapped(lambda split: split.resized(side))

    def held_out(self) -> tuple[Split, Split]:
        """What to learn from and what to choose by, for choices that must not see the test set.

        The validation set where the data bring one, else a share of each class of the training set.
        """
        if self.validation is not None:
            return self.train, self.validation
        generator = torch.Generator().manual_seed(0)
        return divided(self.train, VALIDATION_SHARE, lambda count: torch.randperm(count, generator=generator))


def _digest(parts: Iterable[Split]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        for tensor in (part.images, part.targets):
            digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def divided(split: Split, share: float, permutation: Callable[[int], Tensor]) -> tuple[Split, Split]:
    """The images without, and with, a share of each class, which a permutation of its members chooses."""
    held = torch.zeros(len(split), dtype=torch.bool)
    targets = split.targets.cpu()
    for label in targets.unique():
        members = torch.nonzero(targets == label).squeeze(1)
        count = max(1, round(share * len(members)))
        held[members[permutation(len(members))[:count]]] = True
    held = held.to(split.targets.device)
    return split.where(~held), split.where(held)


def with_test_share(name: str, images: Tensor, targets: Tensor, class_names: tuple[str, ...]) -> ImageData:
    """Set aside a fifth of every class, drawn by a generator whose stream numpy guarantees for good."""
    for class_name, count in zip(class_names, targets.bincount().tolist(), strict=True):
        require(count >= 2, f"class {class_name!r} has {count} image(s): it needs one to train, one to test")
    random = np.random.RandomState(0)
    train, test = divided(
        Split(images, targets), TEST_SHARE, lambda count: torch.from_numpy(random.permutation(count))
    )
    return ImageData.of(name, train, test, class_names)


def joined(first: ImageData, second: ImageData) -> ImageData:
    """The classes of both, those of the second after those of the first.

    All classes get as many test images as the smallest has, so that a test is not one of the larger set.
    """
    require(
        first.shape == second.shape,
        f"{first.name} has images of shape {first.shape} and {second.name} of {second.shape}: give both one "
        "--image-size",
    )
    test = _one_after_the_other(first.test, second.test, first.num_classes)
    smallest = int(test.targets.bincount().min())
    test = test.where(
        class_subset(test.targets, torch.full((first.num_classes + second.num_classes,), smallest))
    )
    learned, chosen = zip(first.held_out(), second.held_out(), strict=True)
    train, validation = (_one_after_the_other(*parts, first.num_classes) for parts in (learned, chosen))
    names = (*first.class_names, *second.class_names)
    return ImageData.of(f"{first.name} and {second.name}", train, test, names, validation)


def _one_after_the_other(first: Split, second: Split, num_classes: int) -> Split:
    images, targets = (
        torch.cat((first.images, second.images)),
        torch.cat((first.targets, second.targets + num_classes)),
    )
    return Split(images, targets)
