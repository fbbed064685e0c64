r"""NC3, self-duality: the rows of the classifier converge to the centered class means, up to one scale."""

from __future__ import annotations

from torch import Tensor

from etflayers.checks import require_values
from etflayers.metrics.nc2 import (
    equinorm,
    float64_rows,
    frobenius,
    require_same_shape,
    row_lengths,
    simplex_coherence_error,
    unit_rows,
)

__all__ = [
    "duality_coherence_error",
    "duality_cosine",
    "duality_distance",
    "duality_row_distance",
    "equinorm_difference",
]


def duality_distance(weight: Tensor, means: Tensor) -> Tensor:
    r"""``| W / |W|_F - M / |M|_F |_F`` (published squared, too).

    Args:
        weight: W, ``(K, d)``, rows of the classifier.
        means: M, ``(K, d)``, class means less the global mean.

    Returns:
        A float64 scalar in [0, 2].

    Raises:
        InvalidArgumentError: shapes that differ, or a zero matrix.

    Reference:
        Papyan, Han, Donoho (2020), arXiv 2008.08186.

    >>> import torch
    >>> duality_distance(torch.eye(2), 3 * torch.eye(2))
    tensor(0., dtype=torch.float64)
    """
    weight, means = _pair(weight, means)
    norms = [frobenius(rows) for rows in (weight, means)]
    require_values(norms[0] > 0, "weight must not be zero")
    require_values(norms[1] > 0, "means must not be zero: all class means coincide")
    return frobenius(weight / norms[0] - means / norms[1])


def duality_coherence_error(weight: Tensor, means: Tensor) -> Tensor:
    r"""``| WM' / |WM'|_F - (I - 11'/K) / sqrt(K-1) |_F``: what the classifier makes of the means.

    Args:
        weight: W, ``(K, d)``.
        means: M, ``(K, d)``, less the global mean.

    Returns:
        A float64 scalar in [0, 2]; 0 if and only if WM' is a positive multiple of I - 11'/K, which does not
        ask for W and M to be parallel.

    Raises:
        InvalidArgumentError: shapes that differ, or WM' = 0.

    Reference:
        Zhu, Ding, Zhou, Li, You, Sulam, Qu (2021), arXiv 2105.02375.
    """
    weight, means = _pair(weight, means)
    return simplex_coherence_error(weight @ means.mT)


def duality_cosine(weight: Tensor, means: Tensor) -> Tensor:
    r"""``1/K sum_k cos(w_k, m_k)``: 1 at self-duality, also where lengths differ from class to class.

    Args:
        weight: W, ``(K, d)``.
        means: M, ``(K, d)``, less the global mean.

    Returns:
        A float64 scalar in [-1, 1].

    Raises:
        InvalidArgumentError: shapes that differ, or a zero row.

    Reference:
        Wu, Papyan (2024), arXiv 2405.17767.
    """
    weight, means = _pair(weight, means)
    return (unit_rows("weight", weight) * unit_rows("means", means)).sum(-1).mean()


def duality_row_distance(weight: Tensor, means: Tensor, *, normalize: bool = True) -> Tensor:
    r"""``1/K sum_k | w_k/|w_k| - m_k/|m_k| |``, row by row.

    Args:
        weight: W, ``(K, d)``.
        means: M, ``(K, d)``, less the global mean.
        normalize: False for ``1/K sum_k |w_k - m_k|``, in which lengths count.

    Returns:
        A float64 scalar >= 0, at most 2 if normalized.

    Raises:
        InvalidArgumentError: shapes that differ, or a zero row to normalize.

    Reference:
        Wu, Papyan (2024), arXiv 2405.17767.
    """
    weight, means = _pair(weight, means)
    if normalize:
        weight, means = unit_rows("weight", weight), unit_rows("means", means)
    return row_lengths(weight - means).mean()


def equinorm_difference(weight: Tensor, means: Tensor, *, correction: int = 1) -> Tensor:
    r"""``| std(|w_k|)/mean(|w_k|) - std(|m_k|)/mean(|m_k|) |``: whether both are as far from equal lengths.

    Args:
        weight: W, ``(K, d)``.
        means: M, ``(K, d)``, less the global mean.
        correction: as in :func:`~etflayers.metrics.equinorm`.

    Returns:
        A float64 scalar >= 0.

    Raises:
        InvalidArgumentError: shapes that differ, or a zero matrix.

    Reference:
        Markou, Ajanthan, Gould (2024), arXiv 2411.01248.

    >>> import torch
    >>> equinorm_difference(torch.eye(2), torch.tensor([[3.0, 0.0], [0.0, 1.0]]), correction=0)
    tensor(0.5000, dtype=torch.float64)
    """
    weight, means = _pair(weight, means)
    return (equinorm(weight, correction=correction) - equinorm(means, correction=correction)).abs()


def _pair(weight: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    weight, means = float64_rows("weight", weight), float64_rows("means", means)
    require_same_shape("weight", weight, "means", means)
    return weight, means
