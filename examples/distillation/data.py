"""Real images as the networks see them: normalized, in memory, of one size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from comparison.data import load
from comparison.settings import Settings as ComparisonSettings
from etflayers.checks import require


@dataclass(frozen=True)
class Images:
    """Images ``(N, C, H, W)`` and their classes ``(N,)``."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images drawn with replacement, by a generator on the CPU."""
        chosen = torch.randint(len(self), (size,), generator=generator).to(self.targets.device)
        return self.inputs[chosen], self.targets[chosen]

    def part(self, chosen: Tensor) -> Images:
        """The images of these numbers, or those where a mask is true."""
        return Images(self.inputs[chosen], self.targets[chosen])


@dataclass(frozen=True)
class RealData:
    """A training set and a test set, in pixels of mean 0 and deviation 1 over the training set."""

    name: str
    train: Images
    test: Images
    class_names: tuple[str, ...]
    mean: Tensor  # of the pixels between 0 and 1, (C,)
    deviation: Tensor

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one image."""
        channels, height, width = self.train.inputs.shape[1:]
        return channels, height, width

    @property
    def normalization(self) -> dict[str, Tensor]:
        """What takes inputs back to pixels between 0 and 1, as a distilled set has it."""
        return {"mean": self.mean, "std": self.deviation}


def load_images(settings: ComparisonSettings, image_size: int | None = None) -> RealData:
    """The data that the settings name, resized to a square of ``image_size`` if that is given.

    Raises:
        InvalidArgumentError: data that cannot be loaded, or images of several channels and none to resize to.
        MissingDependencyError: the package that brings the data is not installed.
    """
    data = load(settings)
    device = settings.torch_device

    def prepared(images: Tensor, targets: Tensor) -> Images:
        inputs = data.normalized(images).contiguous()
        if image_size is not None and inputs.shape[-2:] != (image_size, image_size):
            inputs = F.interpolate(inputs, (image_size, image_size), mode="bilinear", antialias=True)
        return Images(inputs.to(device), targets.to(device))

    return RealData(
        data.name,
        prepared(data.train.images, data.train.targets),
        prepared(data.test.images, data.test.targets),
        data.class_names,
        (data.mean.flatten() / 255).to(device),
        (data.deviation.flatten() / 255).to(device),
    )


def split_off(images: Images, share: float) -> tuple[Images, Images]:
    """The images without, and with, a share of each class: for choices that must not see the test set."""
    require(0 < share < 1, f"share must lie in (0, 1), got {share}")
    generator = torch.Generator().manual_seed(0)
    held = torch.zeros(len(images), dtype=torch.bool)
    targets = images.targets.cpu()
    for label in targets.unique():
        members = torch.nonzero(targets == label).squeeze(1)
        count = max(1, round(share * len(members)))
        held[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    held = held.to(images.targets.device)
    return images.part(~held), images.part(held)
