"""Long-tailed data: most of the images of rare classes are left out of the training set, and of no other."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from etflayers.checks import require
from etflayers.data import class_subset, long_tail_sizes
from etflayers.metrics import groups_from_counts
from lab.data import ImageData, Split
from lab.data.sampling import affine_maps, transformed

Kind = Literal["exponential", "step"]
End = Literal["first", "last"]
DISTORTION = 0.1  # of a view: turned, stretched, sheared and moved by up to about this


def long_tailed(data: ImageData, kind: Kind, ratio: float, views: int = 1, rare: End = "last") -> ImageData:
    """The data with a long tail in the training set; validation and test sets stay balanced.

    Which images stay does not depend on the seed of a run.

    Args:
        data: with about as many images of each class, on the CPU.
        kind: of the tail: see :func:`etflayers.data.long_tail_sizes`.
        ratio: size of the largest class over that of the smallest.
        views: how often each training image occurs, distorted by another fixed map each time: what makes a
            class with eight images large enough for a tail.
        rare: whether the last classes or the first are the rare ones.

    Raises:
        InvalidArgumentError: the rarest class would be left with less than one image.
    """
    train, validation = data.held_out()
    targets = train.targets.repeat(views)
    largest = int(torch.bincount(targets, minlength=data.num_classes).min())
    require(
        ratio <= largest,
        f"--ratios {ratio:g} leaves the rarest class with less than one image, because {data.name} has "
        f"{largest} of a class: take at most that, or more --views",
    )
    sizes = long_tail_sizes(largest, data.num_classes, ratio=ratio, kind=kind)
    chosen = class_subset(targets, sizes if rare == "last" else sizes.flip(0))
    kept = train.where(chosen % len(train))
    if views > 1:
        maps = affine_maps(len(kept), DISTORTION, torch.Generator().manual_seed(0))
        kept = Split(transformed(kept.images, maps), kept.targets)
    return ImageData.of(data.name, kept, data.test, data.class_names, validation)


def counts_of(data: ImageData) -> Tensor:
    """Training images of each class, ``(K,)``."""
    return torch.bincount(data.train.targets, minlength=data.num_classes)


def groups_of(counts: Tensor, kind: Kind) -> dict[str, Tensor]:
    """Frequent and rare classes: thirds of an exponential tail, the two halves of a step."""
    if kind == "exponential":
        return groups_from_counts(counts, quantiles=(1 / 3, 2 / 3))
    middle = float(counts.max() * counts.min()) ** 0.5
    return groups_from_counts(counts, thresholds=(middle, middle))
