"""Which images a training sees, in which order, and how they are varied."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from etflayers.checks import require


def kept_images(
    targets: Tensor, num_classes: int, *, per_class: int | None, imbalance: str, ratio: float
) -> Tensor:
    """The training images that are left where there are to be few, or few of some classes.

    Class k keeps n_k images: with n the size of the smallest class, at most ``per_class``, and r the ratio,
    n_k = n r^(-k/(K-1)) (exponential), or n / r for the last half of the classes (step); at least one.
    """
    sizes = torch.bincount(targets, minlength=num_classes)
    wanted = sizes if per_class is None else sizes.clamp(max=per_class)
    if imbalance != "none":
        places = torch.arange(num_classes, dtype=torch.float64)
        if imbalance == "exponential":
            shares = ratio ** (-places / (num_classes - 1))
        else:
            shares = torch.where(places < num_classes / 2, 1.0, 1 / ratio)
        wanted = (shares * int(wanted.min())).round().clamp(min=1).long()
    random = np.random.RandomState(0)
    kept = []
    for label, count in enumerate(wanted.tolist()):
        members = torch.nonzero(targets == label).squeeze(1)
        kept.append(members[torch.from_numpy(random.permutation(len(members))[:count])])
    return torch.cat(kept).sort().values


def epoch_order(targets: Tensor, num_classes: int, generator: torch.Generator, *, balanced: bool) -> Tensor:
    """The images of an epoch in the order of its batches, ``(N,)``.

    Args:
        targets: ``(N,)``, on the CPU.
        num_classes: K.
        generator: of the order.
        balanced: every K consecutive images are one of each class, so that a batch of a multiple of K is
            stratified; an image of a rare class comes again, one of a frequent class may not come at all.
    """
    if not balanced:
        return torch.randperm(len(targets), generator=generator)
    rounds = -(-len(targets) // num_classes)
    columns = []
    for label in range(num_classes):
        members = torch.nonzero(targets == label).squeeze(1)
        require(len(members) > 0, f"--balanced needs an image of every class, class {label} has none")
        passes = -(-rounds // len(members))
        shuffles = [members[torch.randperm(len(members), generator=generator)] for _ in range(passes)]
        columns.append(torch.cat(shuffles)[:rounds])
    table = torch.stack(columns, dim=1)
    classes = torch.rand(table.shape, generator=generator).argsort(1)
    return table.gather(1, classes).flatten()[: len(targets)]


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
