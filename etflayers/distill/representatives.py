"""What a distilled set starts from: a few images that stand for the real ones of a class.

Each function is given the images of one class. The same functions make the baselines that a distilled set has
to beat at the same number of images.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from etflayers.checks import require, require_finite, require_floating, require_module
from etflayers.distill.labels import class_indices

__all__ = ["Representatives", "kmeans_centers", "partial_means", "per_class", "random_samples"]


class Representatives(Protocol):
    """Images that stand for those of one class."""

    def __call__(self, images: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
        """``(count, ...)`` of ``images`` ``(n, ...)`` with n >= count, drawn with ``generator``."""
        ...


def random_samples(images: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Images drawn without replacement.

    Args:
        images: ``(n, ...)``, of one class.
        count: how many, at most n.
        generator: of the draw; default the default one.

    Returns:
        ``(count, ...)``.

    >>> random_samples(torch.eye(4), 4, None).sum(0)
    tensor([1., 1., 1., 1.])
    """
    return images[torch.randperm(len(images), generator=generator)[:count]]


def partial_means(images: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """The class mean, or for ``count > 1`` the means of as many random parts of the class.

    Copies of one mean would have one gradient, and never part.

    Args:
        images: ``(n, ...)``, of one class.
        count: how many, at most n.
        generator: of the partition; default the default one.

    Returns:
        ``(count, ...)``.

    >>> partial_means(torch.tensor([[1.0], [2.0], [6.0]]), 1, None)
    tensor([[3.]])
    """
    shuffled = images[torch.randperm(len(images), generator=generator)]
    return torch.stack([part.mean(0) for part in shuffled.tensor_split(count)])


def kmeans_centers(images: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """The centers of k-means within the class: ``min sum_i min_j |x_i - c_j|^2``.

    Args:
        images: ``(n, ...)``, of one class.
        count: how many, at most n.
        generator: of the seeds; default the default one.

    Returns:
        ``(count, ...)``.

    Raises:
        MissingDependencyError: scikit-learn is not installed.

    >>> kmeans_centers(torch.tensor([[0.0], [2.0], [10.0], [12.0]]), 2, None).sort(0).values
    tensor([[ 1.],
            [11.]])
    """
    cluster = require_module("sklearn.cluster", extra="distill")
    seed = int(torch.randint(2**31, (), generator=generator))
    rows = images.detach().flatten(1).double().cpu().numpy()
    centers = cluster.KMeans(count, n_init=4, random_state=seed).fit(rows).cluster_centers_
    return torch.from_numpy(centers).to(images).view(count, *images.shape[1:])


def per_class(
    images: Tensor,
    targets: Tensor,
    *,
    count: int,
    num_classes: int | None = None,
    representatives: Representatives = random_samples,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """As many images of each class, class by class in turn: 0, 1, ..., K - 1, 0, 1, ...

    In this order every split into batches of a multiple of K images is balanced.

    Args:
        images: ``(N, ...)``, real ones.
        targets: ``(N,)``, integers in [0, K).
        count: how many images of each class.
        num_classes: K; default the largest target plus 1.
        representatives: how they are made from the images of a class.
        generator: on the CPU, for all that is random.

    Returns:
        Images ``(count * K, ...)`` and their classes ``(count * K,)``.

    Raises:
        InvalidArgumentError: shapes, dtypes or targets that do not fit, a class with less than ``count``
            images.
        NonFiniteError: NaN or infinity in the images.

    >>> images, targets = torch.tensor([[5.0], [7.0], [6.0]]), torch.tensor([1, 0, 1])
    >>> per_class(images, targets, count=1, representatives=partial_means)
    (tensor([[7.0000],
            [5.5000]]), tensor([0, 1]))
    """
    require_floating("images", images.dtype)
    targets = class_indices("targets", targets)
    require(
        targets.shape == images.shape[:1],
        f"targets must be {len(images)} class indices, one for each image, got shape {tuple(targets.shape)}",
    )
    require(
        callable(representatives),
        "representatives must be a function, such as etflayers.distill.kmeans_centers, got "
        f"{representatives!r}",
    )
    require(len(images) > 0, f"images must not be empty, got shape {tuple(images.shape)}")
    require(
        isinstance(count, int) and count >= 1,
        f"count, the number of images of each class, must be an integer >= 1, got {count!r}",
    )
    require_finite(images, "images must be finite, got NaN or infinity: look at what was loaded")
    num_classes = int(targets.max()) + 1 if num_classes is None else num_classes
    require(
        int(targets.min()) >= 0 and int(targets.max()) < num_classes,
        f"targets must lie in [0, {num_classes}), got {int(targets.min())} to {int(targets.max())}",
    )
    sizes = torch.bincount(targets, minlength=num_classes)
    require(
        int(sizes.min()) >= count,
        f"{count} images of each class need as many real ones, class {int(sizes.argmin())} has "
        f"{int(sizes.min())}: take fewer, or noise",
    )
    chosen = [representatives(images[targets == k], count, generator) for k in range(num_classes)]
    classes = torch.arange(num_classes, device=targets.device).repeat(count)
    return torch.stack(chosen, 1).flatten(0, 1), classes
