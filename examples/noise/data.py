"""Labels that are wrong in a known way, in the part to learn from and in the part to choose by."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from etflayers.data import symmetric_noise
from lab.data import ImageData, Split

STREAMS = 2  # of noise for each seed: one for training labels, one for validation labels


@dataclass(frozen=True)
class NoisyData:
    """Images with labels as a training sees them.

    Attributes:
        data: ``train`` and ``validation`` have noisy labels, the test set has true ones.
        originals: the true classes of the training images, ``(N,)``; they serve to measure, never to learn.
        eta: the probability with which a label was drawn anew.
    """

    data: ImageData
    originals: Tensor
    eta: float

    @property
    def corrupted(self) -> Tensor:
        """Which training labels are wrong, ``(N,)``."""
        return self.data.train.targets != self.originals

    @property
    def validation(self) -> Split:
        """To choose by, with noisy labels: who has no clean labels cannot choose by them."""
        assert self.data.validation is not None
        return self.data.validation

    def to(self, device: torch.device) -> NoisyData:
        return replace(self, data=self.data.to(device), originals=self.originals.to(device))


def with_noise(data: ImageData, eta: float, seed: int) -> NoisyData:
    """Draw each label anew with probability eta, after a validation set has been set aside.

    Both parts get noise of the same kind, each from a stream of its own; the images in each part do not
    depend on the seed. One seed draws the same uniform numbers for every eta: what is wrong at .1 is wrong
    at .2 as well.

    Args:
        data: on the CPU, with true labels.
        eta: in [0, 1].
        seed: of the noise.
    """
    parts = data.held_out()
    noisy = []
    for stream, part in enumerate(parts):
        generator = torch.Generator().manual_seed(STREAMS * seed + stream)
        labels = symmetric_noise(part.targets, data.num_classes, eta, generator=generator).targets
        noisy.append(Split(part.images, labels))
    changed = ImageData.of(data.name, noisy[0], data.test, data.class_names, noisy[1])
    return NoisyData(changed, parts[0].targets, eta)
