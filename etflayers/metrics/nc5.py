"""NC5: features of foreign data are orthogonal to the class means."""

from __future__ import annotations

from torch import Tensor

from etflayers.checks import require
from etflayers.metrics.nc2 import float64_rows, unit_rows

__all__ = ["orthogonality_deviation"]


def orthogonality_deviation(means: Tensor, foreign_mean: Tensor) -> Tensor:
    r"""``1/K sum_k |cos(m_k, m_out)|`` with the mean of the features of out-of-distribution data.

    Args:
        means: m, ``(K, d)``, class means of the training set, as they are (published) or less a global mean.
        foreign_mean: m_out, ``(d,)``, in the same coordinates.

    Returns:
        A float64 scalar in [0, 1]; 0 where the foreign mean is orthogonal to all.

    Raises:
        InvalidArgumentError: shapes that do not fit, or a zero vector.

    Reference:
        Ben Ammar, Belkhir, Popescu, Manzanera, Franchi (2023), arXiv 2310.06823.

    >>> import torch
    >>> orthogonality_deviation(torch.eye(3)[:2], torch.tensor([1.0, 0.0, 0.0]))
    tensor(0.5000, dtype=torch.float64)
    """
    means = float64_rows("means", means)
    require(
        foreign_mean.shape == means.shape[1:],
        f"foreign_mean must have shape (d,) = ({means.shape[1]},), got {tuple(foreign_mean.shape)}",
    )
    direction = unit_rows("foreign_mean", foreign_mean.detach().to(means).unsqueeze(0))[0]
    return (unit_rows("means", means) @ direction).abs().mean()
