"""How good a code is for classification."""

from __future__ import annotations

import torch
from torch import Tensor

from etflayers.checks import require, require_floating
from etflayers.codes.code import SphericalCode
from etflayers.precision import full_precision, working_dtype

__all__ = ["coherence"]

# Rows of W W' that exist at a time: two of these blocks fit into a cache.
_BLOCK = 1024


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


def require_rows(rows: Tensor) -> Tensor:
    """The rows, if they are a ``(K, d)`` floating-point matrix with K >= 2."""
    require_floating("rows", rows.dtype)
    require(
        rows.ndim == 2 and rows.shape[0] >= 2 and rows.shape[1] >= 1,
        f"rows must have shape (num_classes, in_features) with at least 2 classes, got {tuple(rows.shape)}",
    )
    return rows
