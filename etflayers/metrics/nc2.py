r"""NC2, convergence to a simplex ETF: equal lengths, equal and largest angles, distance to the nearest frame.

Every function takes K row vectors as they are, so that it serves for classifier weights and for class means;
of the means pass those less the global mean, ``statistics.centered_means()``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from etflayers.checks import require, require_finite, require_floating, require_values
from etflayers.errors import InvalidArgumentError
from etflayers.functional import nearest_etf
from etflayers.geometry import centered

__all__ = [
    "Equiangularity",
    "equiangularity",
    "equinorm",
    "etf_distance",
    "frame_distance",
    "gram_distance",
    "simplex_coherence_error",
]


class Equiangularity(NamedTuple):
    """Mean and maximum over pairs of the deviation of the cosine from that of a simplex ETF."""

    mean: Tensor
    max: Tensor


def equinorm(rows: Tensor, *, correction: int = 1) -> Tensor:
    r"""Coefficient of variation of the lengths, ``std(|x_k|) / mean(|x_k|)``.

    Args:
        rows: X, ``(K, d)``.
        correction: 1 divides the squared deviations by K - 1, as the published code does, 0 by K.

    Returns:
        A float64 scalar >= 0.

    Raises:
        InvalidArgumentError: not K >= 2 rows, or all of them zero.

    Reference:
        Papyan, Han, Donoho (2020), arXiv 2008.08186.

    >>> equinorm(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), correction=0)
    tensor(0.5000, dtype=torch.float64)
    """
    lengths = row_lengths(float64_rows("rows", rows))
    require_values(lengths.sum() > 0, "rows must not all be zero")
    return lengths.std(correction=correction) / lengths.mean()


def equiangularity(rows: Tensor) -> Equiangularity:
    r"""``|cos(x_i, x_j) + 1/(K-1)|`` over the pairs i != j: its mean and its maximum.

    Args:
        rows: X, ``(K, d)``.

    Returns:
        Two float64 scalars >= 0.

    Raises:
        InvalidArgumentError: not K >= 2 rows, or one of them zero, which has no angle.

    Reference:
        Papyan, Han, Donoho (2020), arXiv 2008.08186.

    >>> equiangularity(torch.eye(3))
    Equiangularity(mean=tensor(0.5000, dtype=torch.float64), max=tensor(0.5000, dtype=torch.float64))
    """
    units = unit_rows("rows", float64_rows("rows", rows))
    k = len(units)
    error = (units @ units.mT + 1 / (k - 1)).abs().fill_diagonal_(0)
    return Equiangularity(error.sum() / (k * (k - 1)), error.max())


def simplex_coherence_error(product: Tensor) -> Tensor:
    r"""``| G / |G|_F - (I - 11'/K) / sqrt(K-1) |_F`` for a K x K matrix G of inner products.

    Args:
        product: G, ``(K, K)``: XX' (NC2) or W H' (NC3).

    Returns:
        A scalar in [0, 2]; 0 exactly where G is a positive multiple of I - 11'/K.

    Raises:
        InvalidArgumentError: not a square matrix with K >= 2, or zero.

    Reference:
        Zhu, Ding, Zhou, Li, You, Sulam, Qu (2021), arXiv 2105.02375.
    """
    product = float64_rows("product", product)
    k = len(product)
    require(product.shape == (k, k), f"product must be (K, K), got {tuple(product.shape)}")
    norm = frobenius(product)
    require_values(norm > 0, "product must not be zero: none of the vectors reaches the space of the others")
    ideal = centered(torch.eye(k, dtype=product.dtype, device=product.device)) / math.sqrt(k - 1)
    return frobenius(product / norm - ideal)


def gram_distance(rows: Tensor) -> Tensor:
    r"""``| XX' / |XX'|_F - (I - 11'/K) / sqrt(K-1) |_F``: equal lengths and angles in one number.

    Args:
        rows: X, ``(K, d)``.

    Returns:
        A float64 scalar in [0, 2].

    Raises:
        InvalidArgumentError: not K >= 2 rows, or all of them zero.

    Reference:
        Zhu, Ding, Zhou, Li, You, Sulam, Qu (2021), arXiv 2105.02375.

    >>> from etflayers import simplex_etf
    >>> gram_distance(7 * simplex_etf(4, 6, dtype=torch.float64)).item() < 1e-14
    True
    """
    rows = float64_rows("rows", rows)
    return simplex_coherence_error(rows @ rows.mT)


def etf_distance(rows: Tensor, frame: Tensor | None = None) -> Tensor:
    r"""``| X / |X|_F - W* / sqrt K |_F`` to the simplex ETF W* nearest to the rows (unit rows, norm sqrt K).

    Args:
        rows: X, ``(K, d)`` with d >= K - 1.
        frame: W*, ``(K, d)``, where it is known; default ``nearest_etf(rows)``.

    Returns:
        A float64 scalar.

    Raises:
        InvalidArgumentError: d < K - 1, or all rows zero.

    Reference:
        Markou, Ajanthan, Gould (2024), arXiv 2411.01248.
    """
    rows = float64_rows("rows", rows)
    norm = frobenius(rows)
    require_values(norm > 0, "rows must not all be zero: zero is equally far from every frame")
    frame = nearest_etf(rows) if frame is None else frame
    return frame_distance(rows / norm * math.sqrt(len(rows)), frame)


def frame_distance(first: Tensor, second: Tensor) -> Tensor:
    r"""``|W_1 - W_2|_F / sqrt K`` between two frames of unit rows: between epochs, or of weights and means.

    Args:
        first: W_1, ``(K, d)``.
        second: W_2, ``(K, d)``.

    Returns:
        A float64 scalar in [0, 2].

    Raises:
        InvalidArgumentError: shapes that differ.
    """
    first, second = float64_rows("first", first), float64_rows("second", second)
    require_same_shape("first", first, "second", second)
    return frobenius(first - second) / math.sqrt(len(first))


def row_lengths(rows: Tensor) -> Tensor:
    """Euclidean norms, ``(K,)``."""
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=-1)
    return lengths


def frobenius(matrix: Tensor) -> Tensor:
    """The Frobenius norm."""
    norm: Tensor = torch.linalg.matrix_norm(matrix)
    return norm


def float64_rows(name: str, rows: Tensor) -> Tensor:
    """The rows in float64 and without a graph, after checking that there are at least two, all finite."""
    require_rows(name, rows)
    return rows.detach().double()


def require_rows(name: str, rows: Tensor) -> None:
    """Raise unless ``rows`` holds at least two rows of finite floating-point numbers."""
    require_floating(name, rows.dtype)
    if rows.ndim != 2 or len(rows) < 2:
        raise InvalidArgumentError(f"{name} must have shape (K, d) with K >= 2, got {tuple(rows.shape)}")
    require_finite(rows, f"{name} must be finite: look for what has overflowed in it")


def unit_rows(name: str, rows: Tensor) -> Tensor:
    """The rows divided by their lengths."""
    lengths = row_lengths(rows).unsqueeze(-1)
    require_values((lengths > 0).all(), f"{name} must not hold a zero row: it has no direction")
    return rows / lengths


def require_same_shape(name: str, rows: Tensor, other: str, others: Tensor) -> None:
    """Raise unless the two have the same shape."""
    require(
        rows.shape == others.shape,
        f"{name} and {other} must have the same shape, got {tuple(rows.shape)} and {tuple(others.shape)}",
    )
