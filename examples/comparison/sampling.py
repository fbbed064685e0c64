"""Which images a training sees, and in which order."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from comparison.settings import Settings
from etflayers.checks import require


def kept_images(targets: Tensor, num_classes: int, settings: Settings) -> Tensor:
    """The training images that ``per_class`` and ``imbalance`` leave: the same ones with every seed.

    Class k keeps n_k images: with n the size of the smallest class, at most ``per_class``, and r the ratio,
    n_k = n r^(-k/(K-1)) (exponential), or n / r for the last half of the classes (step); at least one.
    """
    sizes = torch.bincount(targets, minlength=num_classes)
    wanted = sizes if settings.per_class is None else sizes.clamp(max=settings.per_class)
    if settings.imbalance != "none":
        places = torch.arange(num_classes, dtype=torch.float64)
        if settings.imbalance == "exponential":
            shares = settings.imbalance_ratio ** (-places / (num_classes - 1))
        else:
            shares = torch.where(places < num_classes / 2, 1.0, 1 / settings.imbalance_ratio)
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
