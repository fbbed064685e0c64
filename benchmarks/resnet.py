"""The ResNets for small images whose training step the heads are measured in."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["FEATURES", "resnet18_features", "resnet50_features"]

FEATURES = 512  # of ResNet-18


class _Block(nn.Module):
    """A residual branch and a shortcut (He, Zhang, Ren, Sun 2016, arXiv 1512.03385)."""

    def __init__(self, residual: nn.Module, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.residual = residual
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = _convolution(in_channels, out_channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.residual(x) + self.shortcut(x), inplace=True)


def _convolution(in_channels: int, out_channels: int, size: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, size, stride, size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
    )


def _basic(in_channels: int, width: int, stride: int) -> _Block:
    residual = nn.Sequential(
        _convolution(in_channels, width, 3, stride), nn.ReLU(inplace=True), _convolution(width, width, 3)
    )
    return _Block(residual, in_channels, width, stride)


def _bottleneck(in_channels: int, width: int, stride: int) -> _Block:
    residual = nn.Sequential(
        _convolution(in_channels, width, 1),
        nn.ReLU(inplace=True),
        _convolution(width, width, 3, stride),
        nn.ReLU(inplace=True),
        _convolution(width, 4 * width, 1),
    )
    return _Block(residual, in_channels, 4 * width, stride)


def _features(
    channels: int, block: Callable[[int, int, int], _Block], counts: tuple[int, ...], expansion: int
) -> nn.Module:
    """A 3x3 stem without pooling, four stages, a global mean."""
    layers: list[nn.Module] = [_convolution(channels, 64, 3), nn.ReLU(inplace=True)]
    before = 64
    for width, count, first in zip((64, 128, 256, 512), counts, (1, 2, 2, 2), strict=True):
        for index in range(count):
            layers.append(block(before, width, first if index == 0 else 1))
            before = expansion * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).to(memory_format=torch.channels_last)


def resnet18_features(channels: int) -> nn.Module:
    """(B, channels, H, W) to (B, 512)."""
    return _features(channels, _basic, (2, 2, 2, 2), 1)


def resnet50_features(channels: int) -> nn.Module:
    """(B, channels, H, W) to (B, 2048)."""
    return _features(channels, _bottleneck, (3, 4, 6, 3), 4)
