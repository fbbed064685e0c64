"""The network and the data of the inner-loop suite."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["CLASSES", "SIDE", "Problem", "convnet"]

CLASSES, SIDE = 10, 28


def convnet(width: int = 64, blocks: int = 3) -> nn.Sequential:
    """Blocks of convolution, instance norm, ReLU and pooling, then a linear layer, as the field uses."""
    layers: list[nn.Module] = []
    for block in range(blocks):
        channels = 1 if block == 0 else width
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.InstanceNorm2d(width, affine=True), nn.ReLU()]
        layers.append(nn.AvgPool2d(2))
    side = SIDE // 2**blocks
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * side * side, CLASSES))


class Problem:
    """A network, distilled images with soft labels and rates, and real images for the outer loss."""

    def __init__(
        self,
        count: int,
        steps: int,
        dtype: torch.dtype = torch.float32,
        *,
        width: int = 64,
        blocks: int = 3,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        self.model = convnet(width, blocks).to(dtype)
        self.steps = steps
        self.images = torch.randn(1, count, 1, SIDE, SIDE, generator=generator).to(dtype).requires_grad_()
        labels = torch.arange(count) % CLASSES
        self.labels = torch.eye(CLASSES, dtype=dtype)[labels][None].requires_grad_()
        self.rates = torch.full((steps,), 0.01, dtype=dtype, requires_grad=True)
        self.real = torch.randn(10, 1, SIDE, SIDE, generator=generator).to(dtype)
        self.targets = torch.arange(10) % CLASSES

    @property
    def variables(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.images, self.labels, self.rates
