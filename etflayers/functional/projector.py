r"""The frozen ETF projector: two matrices that are never made.

Symbols: z <-> rows, m <-> mean, c <-> factor, a <-> positive, r <-> rest.

The projector of Harun et al. is ``out = A' relu(A z)``, divided by its length, with a frozen matrix A of 4d
rows: ``A = c (J - 1 1'/d)``, ``c = sqrt(d/(d - 1))``, where J, ``(4d, d)``, is an identity above zeros (their
code builds it from ``torch.eye(4 * d, d)``). So the first d rows of A are the vertices of the canonical
simplex ETF, and the other 3d rows are all ``-c 1'/d``. Hence A z has the entries ``c (z_i - m)``, m the mean
of z, and 3d times ``-c m``. After the ReLU these are a and, 3d times, r. Their sum is ``sum a + 3 d r``, and
A' takes its d-th part from each of the first d entries:

    out = c (a - (sum a + 3 d r)/d),      a = relu(c (z - m)),      r = relu(-c m).

O(d) instead of 8 d^2 products, and no weights to be stored, frozen or decayed.
"""

from __future__ import annotations

from torch import Tensor

from etflayers.checks import require, require_floating
from etflayers.functional.logits import directions
from etflayers.precision import full_precision, working_dtype

__all__ = ["etf_projection"]


def etf_projection(features: Tensor) -> Tensor:
    r"""The direction of ``A' relu(A z)`` with the frozen 4d x d matrix of a canonical simplex ETF, in O(d).

    Args:
        features: z, ``(..., d)``, d >= 2.

    Returns:
        ``(..., d)``, unit length, in float32 or better. Zero features have no direction, and stay zero, with
        a zero gradient. Entries that are equal and positive have none either: there rounding decides.

    Raises:
        InvalidArgumentError: d < 2, or features that are not floating point.

    Reference:
        Harun, Gallardo, Kanan (2025), arXiv 2502.10691.

    >>> import torch
    >>> etf_projection(torch.tensor([3.0, 0.0, 0.0]))
    tensor([ 0.8165, -0.4082, -0.4082])
    """
    require_floating("features", features.dtype)
    require(
        features.ndim > 0 and features.shape[-1] >= 2,
        f"features must have shape (..., d) with d >= 2, got {tuple(features.shape)}",
    )
    width = features.shape[-1]
    factor = (width / (width - 1)) ** 0.5
    with full_precision(features):
        rows = features.to(working_dtype(features.dtype))
        mean = rows.mean(-1, keepdim=True)
        positive, rest = (factor * (rows - mean)).relu(), (-factor * mean).relu()
        return directions(factor * (positive - positive.mean(-1, keepdim=True) - 3 * rest))
