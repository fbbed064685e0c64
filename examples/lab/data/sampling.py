"""Batches without end, and images that are shifted, turned, mirrored or seen through a map."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def endless_batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Numbers of images, in batches of ``size``, or all where there are no more, shuffled for every pass.

    What does not fill a batch is left over.
    """
    order = torch.empty(0, dtype=torch.int64)
    while True:
        if len(order) < min(size, count):
            order = torch.randperm(count, generator=generator)
        chosen, order = order.tensor_split([size])
        yield chosen


def shifted(images: Tensor, shifts: Tensor) -> Tensor:
    """Move each image ``(N, C, H, W)`` by its shift ``(N, 2)`` down and right; what comes in is black."""
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=images.device) - shifts[:, :1]
    columns = torch.arange(width, device=images.device) - shifts[:, 1:]
    inside = ((rows >= 0) & (rows < height)).unsqueeze(2) & ((columns >= 0) & (columns < width)).unsqueeze(1)
    number = torch.arange(len(images), device=images.device).view(-1, 1, 1)
    moved = images.permute(0, 2, 3, 1)[
        number, rows.clamp(0, height - 1).unsqueeze(2), columns.clamp(0, width - 1).unsqueeze(1)
    ]
    return (moved * inside.unsqueeze(-1)).permute(0, 3, 1, 2)


def random_shifts(count: int, most: int, generator: torch.Generator) -> Tensor:
    """Shifts ``(count, 2)`` for `shifted`, of up to ``most`` pixels each way."""
    return torch.randint(-most, most + 1, (count, 2), generator=generator)


def turned(images: Tensor, angles: Tensor) -> Tensor:
    """Turn each image ``(N, C, H, W)`` about its center by its angle ``(N,)`` in radians, counterclockwise.

    Values between pixels are interpolated; what comes in is black.
    """
    height, width = images.shape[-2:]
    cos, sin, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
    # A grid counts from -1 to 1 along both sides: pixels are square only after a factor.
    first = torch.stack((cos, -sin * height / width, zero), 1)
    second = torch.stack((sin * width / height, cos, zero), 1)
    grid = F.affine_grid(torch.stack((first, second), 1).to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def mirrored(images: Tensor, chosen: Tensor) -> Tensor:
    """Exchange left and right of the images ``(N, C, H, W)`` where a mask ``(N,)`` is true."""
    return torch.where(chosen.view(-1, 1, 1, 1), images.flip(-1), images)


def affine_maps(count: int, size: float, generator: torch.Generator) -> Tensor:
    """Random maps ``x -> A x + t`` near the identity, ``(N, 2, 3)``: every entry off by at most ``size``.

    That turns, stretches and shears an image by up to about ``size`` (in radians, as a factor) and moves it
    by half of ``size`` times its side.
    """
    noise = 2 * torch.rand(count, 2, 3, generator=generator) - 1
    return torch.eye(2, 3) + size * noise


def transformed(images: Tensor, maps: Tensor) -> Tensor:
    """Bytes ``(N, C, H, W)`` seen through the maps ``(N, 2, 3)``; what comes in is black."""
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, align_corners=False).round().to(images.dtype)
