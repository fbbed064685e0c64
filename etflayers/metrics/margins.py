"""Cosine margins: how far the angle to the own class vector is ahead of that to any other."""

from __future__ import annotations

import torch
from torch import Tensor

from etflayers.checks import require_finite
from etflayers.errors import InvalidArgumentError
from etflayers.functional.class_means import ignored_targets
from etflayers.metrics.moments import require_features
from etflayers.metrics.nc2 import require_rows
from etflayers.precision import full_precision, working_dtype

__all__ = ["cosine_margins", "own_cosines"]


@torch.no_grad()
def cosine_margins(
    features: Tensor,
    targets: Tensor,
    weight: Tensor,
    *,
    center: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    r"""``cos(h, w_y) - max_{j != y} cos(h, w_j)`` for each sample: K / (K - 1) at collapse.

    Args:
        features: h, ``(B, d)``.
        targets: y, ``(B,)``, integers in [0, K) or ``ignore_index``.
        weight: W, ``(K, d)``.
        center: a global mean, ``(d,)``, taken from the features; the rows of W then lose their mean, too, as
            published. Default: features and weight as they are.
        ignore_index: target of the samples to leave out.

    Returns:
        One margin for each sample that is not ignored, in [-2, 2], float32 or better, in the order of the
        samples; sorted, the curve P_CM. A zero vector counts as orthogonal to all.

    Raises:
        InvalidArgumentError: shapes or dtypes that do not fit, targets out of range.
        NonFiniteError: NaN or infinity in the weight, or in a sample that is not ignored.

    Reference:
        Markou, Ajanthan, Gould (2024), arXiv 2411.01248.

    >>> from etflayers import simplex_etf
    >>> frame = simplex_etf(3, 3)
    >>> cosine_margins(5 * frame, torch.arange(3), frame)
    tensor([1.5000, 1.5000, 1.5000])
    """
    projections, lengths, targets = _projections(features, targets, weight, center, ignore_index)
    return margins_of(projections, lengths, targets)


@torch.no_grad()
def own_cosines(
    features: Tensor,
    targets: Tensor,
    weight: Tensor,
    *,
    center: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    r"""``cos(h, w_y)`` for each sample, whose mean is 1 at collapse: the first part of the margin.

    Args:
        features: as in :func:`cosine_margins`.
        targets: as in :func:`cosine_margins`.
        weight: as in :func:`cosine_margins`.
        center: as in :func:`cosine_margins`.
        ignore_index: as in :func:`cosine_margins`.

    Returns:
        One cosine for each sample that is not ignored, float32 or better, in the order of the samples.

    Raises:
        InvalidArgumentError: as in :func:`cosine_margins`.
        NonFiniteError: as in :func:`cosine_margins`.

    >>> own_cosines(torch.tensor([[3.0, 0.0], [1.0, 1.0]]), torch.tensor([0, 0]), torch.eye(2))
    tensor([1.0000, 0.7071])
    """
    projections, lengths, targets = _projections(features, targets, weight, center, ignore_index)
    own = projections.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return _finite(_divided(own, lengths))


def _projections(
    features: Tensor, targets: Tensor, weight: Tensor, center: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``|h| cos(h, w_k)``, ``(B', K)``, ``|h|`` and the targets of the samples that are not ignored."""
    require_rows("weight", weight)
    require_features(features, targets, weight.shape[1])
    valid = ~ignored_targets(targets, len(weight), ignore_index)
    dtype = working_dtype(features.dtype)
    rows, features, targets = weight.detach(), features.detach()[valid], targets.long()[valid]
    if center is not None:
        if center.shape != rows.shape[1:]:
            raise InvalidArgumentError(
                f"center must have shape (d,) = ({rows.shape[1]},), got {tuple(center.shape)}"
            )
        # In float64: a large mean need not be a number of the features' dtype, and would take their digits.
        features = features.double() - center.detach().to(features.device, torch.float64)
        rows = rows.double() - rows.double().mean(0)
    features = features.to(dtype)
    with full_precision(features):
        products = features @ rows.to(features.device, dtype).mT
    return projections_of(products, rows), torch.linalg.vector_norm(features, dim=-1), targets


def row_cosines(features: Tensor, rows: Tensor) -> Tensor:
    """``cos(h, w_k)``, ``(B, K)``, and zero for zero vectors; rows in any dtype, not centered."""
    with full_precision(features):
        products = features @ rows.to(features.device, features.dtype).mT
    lengths = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
    return _divided(projections_of(products, rows), lengths)


def projections_of(products: Tensor, rows: Tensor) -> Tensor:
    """``<h, w_k> / |w_k| = |h| cos(h, w_k)``, ``(B, K)``, from ``<h, w_k>``; zero for zero rows.

    Lengths divide the products, instead of rows in a copy. The rows may be in a wider dtype than these.
    """
    lengths = torch.linalg.vector_norm(rows.to(working_dtype(rows.dtype)), dim=-1)
    return _divided(products, lengths.to(products))


def margins_of(projections: Tensor, lengths: Tensor, targets: Tensor) -> Tensor:
    """What the cosine with the own class is ahead of the largest other, ``(B,)``; zero for a zero vector.

    The length of h is a factor of all its projections, and divides one number instead of K.

    Args:
        projections: ``|h| cos(h, w_k)``, ``(B, K)``; overwritten.
        lengths: ``|h|``, ``(B,)``.
        targets: y, ``(B,)`` int64.

    Raises:
        NonFiniteError: NaN or infinity in a sample.
    """
    targets = targets.unsqueeze(-1)
    own = projections.gather(-1, targets)
    others = projections.scatter_(-1, targets, -torch.inf).amax(-1, keepdim=True)
    return _finite(_divided((own - others).squeeze(-1), lengths))


def _divided(numbers: Tensor, lengths: Tensor) -> Tensor:
    """``numbers / lengths``, and zero where both are."""
    return numbers / lengths.clamp(min=torch.finfo(lengths.dtype).tiny)


def _finite(found: Tensor) -> Tensor:
    require_finite(found, "features must be finite where they are not ignored: NaN has no angle")
    return found
