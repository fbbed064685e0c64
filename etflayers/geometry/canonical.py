"""Products with the canonical simplex ETF and with its transpose, without the matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from etflayers._torch import allow_in_graph, apply_function
from etflayers.checks import require_floating
from etflayers.errors import InvalidArgumentError
from etflayers.geometry.frames import (
    centered_basis_adjoint,
    centered_basis_apply,
    etf_radius,
    require_etf_dims,
)
from etflayers.precision import linear_dtype, working_dtype

__all__ = ["canonical_etf_adjoint", "canonical_etf_logits"]


def canonical_etf_logits(features: Tensor, num_classes: int, *, scale: float = 1.0) -> Tensor:
    r"""Inner products with the canonical simplex ETF in O(K) a sample: a slice, a mean and a scale.

    The canonical frame is ``W = c (I - 11'/K)`` followed by zero columns, so ``W f = c (f_{1:K} -
    mean(f_{1:K}))``. For d = K - 1 it is ``W = c E'``, one Householder reflection of f.

    Args:
        features: f, ``(..., d)`` with d >= K - 1.
        num_classes: K >= 2.
        scale: a factor s of all logits.

    Returns:
        ``(..., K)``, equal to ``s F.linear(features, simplex_etf(K, d))`` and in the dtype that would have,
        computed in float32 or better.

    Raises:
        InvalidArgumentError: K < 2, d < K - 1 or a dtype that is not floating point.

    >>> canonical_etf_logits(torch.tensor([[3.0, 0.0, 0.0, 7.0]]), num_classes=3)
    tensor([[ 2.4495, -1.2247, -1.2247]])
    """
    require_floating("features", features.dtype)
    if features.ndim == 0:
        raise InvalidArgumentError("features must have shape (..., in_features), got a scalar")
    require_etf_dims(num_classes, features.shape[-1])
    rows, factor = features.to(working_dtype(features.dtype)), scale * etf_radius(num_classes)
    if features.shape[-1] == num_classes - 1:
        logits = factor * centered_basis_adjoint(rows.unsqueeze(-1)).squeeze(-1)
    else:
        logits = _scaled_centering(rows[..., :num_classes], factor)
    return logits.to(linear_dtype(features))


def canonical_etf_adjoint(cotangent: Tensor, in_features: int) -> Tensor:
    r"""Sums of the rows of the canonical simplex ETF, ``W'c``, in O(K) each.

    Args:
        cotangent: c, ``(..., K)``, in float32 or better.
        in_features: d >= K - 1.

    Returns:
        ``(..., d)``.

    Raises:
        InvalidArgumentError: K < 2 or d < K - 1.

    >>> canonical_etf_adjoint(torch.tensor([1.0, -1.0, 0.0]), in_features=4)
    tensor([ 1.2247, -1.2247,  0.0000,  0.0000])
    """
    num_classes = cotangent.shape[-1]
    require_etf_dims(num_classes, in_features)
    factor = etf_radius(num_classes)
    if in_features == num_classes - 1:
        return factor * centered_basis_apply(cotangent.unsqueeze(-1)).squeeze(-1)
    return torch.nn.functional.pad(_scaled_centering(cotangent, factor), (0, in_features - num_classes))


# torch.compile refuses functions with a forward mode; as one node of the graph they keep it.
@allow_in_graph
def _scaled_centering(rows: Tensor, factor: float) -> Tensor:
    """``a (x - mean x)`` along the last dimension."""
    scaled: Tensor = apply_function(_ScaledCentering, rows, factor)
    return scaled


class _ScaledCentering(torch.autograd.Function):
    """The matrix ``a (I - 11'/K)`` is symmetric: the map is its own adjoint, in one piece of fresh memory."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, factor: float) -> Tensor:
        return (rows - rows.mean(-1, keepdim=True)).mul_(factor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _scaled_centering(grad, ctx.factor), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return _scaled_centering(tangent, ctx.factor)
