"""What becomes a logit: inner products with the canonical simplex ETF, and directions of features."""

from __future__ import annotations

import torch
from torch import Tensor

from etflayers.geometry.canonical import canonical_etf_logits
from etflayers.precision import full_precision, working_dtype

__all__ = ["canonical_etf_logits", "directions"]

# As in F.normalize.
_SHORTEST = 1e-12


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
