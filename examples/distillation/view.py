"""How those who learn from images see them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from etflayers.distill import DistilledSet
from etflayers.storage import write_tensors
from lab.data import ImageData
from lab.data.whitening import Whitening

Change = Callable[[Tensor], Tensor]  # of images whose black is 0


class View:
    """How images are seen: normalized, and whitened where asked.

    Args:
        data: normalized images.
        ridge: of the whitening; ``None``: as they are.
    """

    def __init__(self, data: ImageData, ridge: float | None = None) -> None:
        self.normalization = data.normalization
        self.whitening = None if ridge is None else Whitening.of(data.train.images, ridge)
        self.data = data if self.whitening is None else self.whitening.of_data(data)

    def changed(self, inputs: Tensor, changes: Sequence[Change]) -> Tensor:
        """Inputs whose images are changed, pixels that come in being black, and that are seen again."""
        mean, deviation = self.normalization.values()
        black = (-mean / deviation).view(1, -1, 1, 1)
        images = inputs if self.whitening is None else self.whitening.undone(inputs)
        images = images - black
        for change in changes:
            images = change(images)
        images = images + black
        return images if self.whitening is None else self.whitening(images)

    @torch.no_grad()
    def shown(self, distilled: DistilledSet) -> Tensor:
        """The pictures of a set."""
        if self.whitening is None:
            return distilled.images()
        plain = self.whitening.undone(distilled.inputs)
        return DistilledSet(plain, distilled.labels, **self.normalization).images()

    def save(self, path: Path) -> None:
        """Write what takes images to inputs and back, where that is more than a set says of itself."""
        if self.whitening is not None:
            write_tensors(path, {**vars(self.whitening), **self.normalization}, {"kind": "whitening"})
