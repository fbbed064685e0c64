"""Inner products with the canonical simplex ETF, without its matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from etflayers._torch import allow_in_graph, apply_function
from etflayers.checks import require_floating
from etflayers.errors import InvalidArgumentError
from etflayers.geometry import centered_basis_adjoint, etf_radius, require_etf_dims
from etflayers.precision import autocast_dtype, full_precision, working_dtype

__all__ = ["canonical_etf_logits", "directions", "linear_dtype"]

# As in F.normalize.
_SHORTEST = 1e-12


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


def directions(features: Tensor) -> Tensor:
    r"""Features divided by their lengths, ``f / |f|``, and zero, with a zero gradient, for ``|f| < 1e-12``.

    A dead feature vector has no direction. ``F.normalize`` divides it by 1e-12, and its gradient with it.

    Args:
        features: f, ``(..., d)``.

    Returns:
        ``(..., d)``, computed and returned in float32 or better.

    >>> directions(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    with full_precision(features):
        rows = features.to(working_dtype(features.dtype))
        lengths = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        dead = lengths < _SHORTEST  # not so for NaN, which has to stay one
        return torch.where(dead, 0, rows / torch.where(dead, 1, lengths))


def linear_dtype(features: Tensor) -> torch.dtype:
    """The dtype that ``F.linear`` returns for ``features``: autocast's, where that is on, or their own."""
    dtype = autocast_dtype(features.device.type)
    # Autocast leaves float64 alone.
    return features.dtype if dtype is None or features.dtype == torch.float64 else dtype
