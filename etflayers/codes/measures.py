"""How good a code is for classification."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from etflayers.checks import require, require_concrete, require_finite, require_floating
from etflayers.codes.code import SphericalCode
from etflayers.codes.nearest_points import NearestPoints, nearest_points
from etflayers.precision import full_precision, working_dtype

__all__ = ["coherence", "one_vs_rest_distance", "require_rows"]

# Rows of W W' that exist at a time: two of these blocks fit into a cache.
_BLOCK = 1024
# Words whose nearest points are looked for at a time: their corners are (512, d + 2, d) numbers.
_BATCH = 512
# A distance that may be 0, known as it is from its square.
_WITHIN = 1e-6


@torch.no_grad()
def coherence(code: SphericalCode | Tensor) -> Tensor:
    r"""The largest *signed* cosine between two different words, ``max_{i != j} <w_i, w_j>``.

    The literature on frames means the largest absolute cosine by this name. An equiangular frame of K > d + 1
    words minimizes that one; in classification the signed one counts, since a word at -1 is far away. Up to K
    = 2 d the orthoplex, with cosines 0 and -1, beats every such frame.

    Args:
        code: a code, measured in float64, or its words, ``(K, d)`` unit rows with K >= 2.

    Returns:
        A scalar, in float32 or better. The K x K matrix is never stored.

    Raises:
        InvalidArgumentError: rows that are no matrix of K >= 2 rows.

    >>> coherence(torch.eye(3))
    tensor(0.)
    """
    rows = code.dense(dtype=torch.float64) if isinstance(code, SphericalCode) else require_rows(code)
    rows = rows.to(working_dtype(rows.dtype))
    largest = rows.new_tensor(-torch.inf)
    with full_precision(rows):
        for start in range(0, rows.shape[0], _BLOCK):
            block = rows[start : start + _BLOCK]
            cosines = block @ block.mT
            cosines.fill_diagonal_(-torch.inf)
            largest = torch.maximum(largest, cosines.max())
            for other in range(start + _BLOCK, rows.shape[0], _BLOCK):
                largest = torch.maximum(largest, (block @ rows[other : other + _BLOCK].mT).max())
    return largest


def one_vs_rest_distance(code: SphericalCode | Tensor) -> Tensor:
    r"""Distance of each word from the convex hull of all others, ``min_lambda |w_k - sum_j lambda_j w_j|``.

    Twice the margin with which a hyperplane can separate one word from all others. The smallest of these
    distances is what training by cross-entropy at a low temperature makes large. They are found by Wolfe's
    algorithm in float64, with a certificate, to about 1e-12 (1e-6 for a word within the hull of the others).

    The gradient is that of Danskin's theorem: at the minimum the weights lambda count as constants. Where the
    nearest point is not unique in its weights it is one of the gradients that are possible; at distance 0 it
    is zero. There is no second derivative.

    Args:
        code: a code, or its words, ``(K, d)`` unit rows with K >= 2.

    Returns:
        ``(K,)``, float64 for a code, otherwise as precise as the rows, or float32 for half precision.

    Raises:
        InvalidArgumentError: no matrix of K >= 2 rows, one that is being traced, or a second derivative.
        NonFiniteError: NaN or infinity among the rows.
        ConvergenceError: rounding kept the algorithm from its end.

    Reference:
        Jiang, Zhou, Wang, Qu, Mixon, You, Zhu (2023), arXiv 2310.05351; Wolfe (1976), Finding the nearest
        point in a polytope.

    >>> one_vs_rest_distance(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
    tensor([1.4142, 1.0000, 1.4142])
    """
    rows = code.dense(dtype=torch.float64) if isinstance(code, SphericalCode) else require_rows(code)
    require_concrete(rows, "one_vs_rest_distance", "call it outside")
    require_finite(rows, "rows hold NaN or infinity")
    distances: Tensor = _HullDistances.apply(rows.double())  # type: ignore[no-untyped-call]
    return distances.to(working_dtype(rows.dtype))


class _HullDistances(torch.autograd.Function):
    """Of each row from the convex hull of the others, with the weights of the nearest points as constants."""

    @staticmethod
    def forward(ctx: Any, words: Tensor) -> Tensor:
        parts = [
            nearest_points(words, part)
            for part in torch.split(torch.arange(len(words), device=words.device), _BATCH)
        ]
        points = NearestPoints(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
        shortest = torch.stack([w @ words[c] for c, w in zip(*points, strict=True)]) - words
        distances: Tensor = torch.linalg.vector_norm(shortest, dim=-1)
        inverse = torch.where(distances > _WITHIN, 1 / distances, 0)
        ctx.save_for_backward(*points, inverse.unsqueeze(-1) * shortest)
        return distances

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        require(
            not torch.is_grad_enabled(),
            "one_vs_rest_distance has no second derivative: take its gradient without create_graph=True",
        )
        corners, weights, direction = ctx.saved_tensors
        along = grad.unsqueeze(-1) * direction
        shares = weights.unsqueeze(-1) * along.unsqueeze(-2)
        into: Tensor = (-along).index_add_(0, corners.flatten(), shares.flatten(0, 1))
        return into


def require_rows(rows: Tensor) -> Tensor:
    """The rows, if they are a ``(K, d)`` floating-point matrix with K >= 2."""
    require_floating("rows", rows.dtype)
    require(
        rows.ndim == 2 and rows.shape[0] >= 2 and rows.shape[1] >= 1,
        f"rows must have shape (num_classes, in_features) with at least 2 classes, got {tuple(rows.shape)}",
    )
    return rows
