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
    cosines, targets = _cosines(features, targets, weight, center, ignore_index)
    return margins_of(cosines, targets)


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
    cosines, targets = _cosines(features, targets, weight, center, ignore_index)
    return cosines.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def _cosines(
    features: Tensor, targets: Tensor, weight: Tensor, center: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """``cos(h, w_k)``, ``(B', K)``, and the targets of the samples that are not ignored."""
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
    cosines = row_cosines(features.to(dtype), rows)
    require_finite(cosines, "features must be finite where they are not ignored: NaN has no angle")
    return cosines, targets


def row_cosines(features: Tensor, rows: Tensor) -> Tensor:
    """``cos(h, w_k)``, ``(B, K)``, and zero for zero vectors; rows in any dtype, not centered."""
    with full_precision(features):
        products = features @ rows.to(features.device, features.dtype).mT
    return cosines_of(products, features, rows)


def cosines_of(products: Tensor, features: Tensor, rows: Tensor) -> Tensor:
    """``cos(h, w_k)``, ``(B, K)``, from the products ``<h, w_k>``; zero for zero vectors."""
    # Lengths divide the products: two divisions of B K numbers instead of copies of features and rows. The
    # rows may be in a wider dtype than their products.
    lengths = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
    row_lengths = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64).to(products)
    cosines = products / torch.where(lengths > 0, lengths, 1)
    return cosines.div_(torch.where(row_lengths > 0, row_lengths, 1))


def margins_of(cosines: Tensor, targets: Tensor) -> Tensor:
    """What the cosine with the own class is ahead of the largest other, ``(B,)``."""
    own = cosines.gather(-1, targets.unsqueeze(-1))
    others = cosines.scatter(-1, targets.unsqueeze(-1), -torch.inf)
    return (own - others.amax(-1, keepdim=True)).squeeze(-1)
