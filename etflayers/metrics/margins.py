"""Cosine margins: how far the angle to the own class vector is ahead of that to any other."""

from __future__ import annotations

import torch
from torch import Tensor

from etflayers.checks import require
from etflayers.errors import InvalidArgumentError
from etflayers.functional.class_means import ignored_targets
from etflayers.metrics.moments import require_features
from etflayers.metrics.nc2 import float64_rows
from etflayers.precision import full_precision, working_dtype

__all__ = ["cosine_margins"]


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

    Reference:
        Markou, Ajanthan, Gould (2024), arXiv 2411.01248.

    >>> from etflayers import simplex_etf
    >>> frame = simplex_etf(3, 3)
    >>> cosine_margins(5 * frame, torch.arange(3), frame)
    tensor([1.5000, 1.5000, 1.5000])
    """
    rows = float64_rows("weight", weight)
    require_features(features, targets, rows.shape[1])
    valid = ~ignored_targets(targets, len(rows), ignore_index)
    dtype = working_dtype(features.dtype)
    features, targets = features.detach().to(dtype)[valid], targets[valid].long().unsqueeze(-1)
    if center is not None:
        if center.shape != rows.shape[1:]:
            raise InvalidArgumentError(
                f"center must have shape (d,) = ({rows.shape[1]},), got {tuple(center.shape)}"
            )
        features = features - center.to(dtype)
        rows = rows - rows.mean(0)
    require(len(rows) >= 2, "weight must have at least two rows: a margin needs another class")
    with full_precision(features):
        unit = torch.nn.functional.normalize
        cosines = unit(features, dim=-1) @ unit(rows, dim=-1).to(dtype).mT
    own = cosines.gather(-1, targets)
    others = cosines.scatter(-1, targets, -torch.inf)
    return (own - others.amax(-1, keepdim=True)).squeeze(-1)
