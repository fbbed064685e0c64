r"""NC2 beyond the simplex: how evenly directions are spread over the sphere, for any K and d.

More than d + 1 vectors form no simplex ETF. What the means still approach is hyperspherical uniformity: a
minimum of an energy ``1 / (K(K-1)/2) sum_{i<j} f(|u_i - u_j|)`` of the directions u with a decreasing f. At a
simplex ETF all distances are ``sqrt(2K / (K - 1))`` and the variance over the pairs is zero.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from etflayers.checks import require
from etflayers.metrics.nc2 import float64_rows, unit_rows

__all__ = ["HypersphericalEnergy", "hyperspherical_energy"]


class HypersphericalEnergy(NamedTuple):
    """Mean and variance (divided by the number of pairs) of a kernel over the pairs of directions."""

    mean: Tensor
    variance: Tensor


def hyperspherical_energy(
    rows: Tensor, *, kernel: Literal["distance", "log", "riesz"] = "log", exponent: float | None = None
) -> HypersphericalEnergy:
    r"""Mean and variance of ``f(|x_i/|x_i| - x_j/|x_j||)`` over the pairs i < j.

    Args:
        rows: X, ``(K, d)``; class means less the global mean, or weights.
        kernel: ``"distance"``: f(r) = r; ``"log"``: f(r) = log(1/r); ``"riesz"``: f(r) = sign(s) r^{-s}.
        exponent: s of the Riesz kernel, not 0 (whose limit is the logarithm); default d - 2, as published.

    Returns:
        Two float64 scalars; infinity where two directions coincide and f(0) is infinite.

    Raises:
        InvalidArgumentError: not K >= 2 rows, a zero row, an unknown kernel, or s = 0.

    Reference:
        Liu, Yu, Weller, Schölkopf (2023), arXiv 2303.06484.

    >>> from etflayers import simplex_etf
    >>> hyperspherical_energy(simplex_etf(3, 4), kernel="distance").mean.square()
    tensor(3.0000, dtype=torch.float64)
    """
    units = unit_rows("rows", float64_rows("rows", rows))
    require(
        kernel in ("distance", "log", "riesz"), f"kernel must be 'distance', 'log' or 'riesz', got {kernel!r}"
    )
    require(
        exponent is None or kernel == "riesz", f"exponent is for kernel='riesz' only, got kernel={kernel!r}"
    )
    distances = torch.pdist(units)
    if kernel == "log":
        values = -distances.log()
    elif kernel == "riesz":
        s = units.shape[1] - 2 if exponent is None else exponent
        require(
            math.isfinite(s) and s != 0,
            f"exponent (default d - 2) must be finite and not 0, got {s}: take 'log'",
        )
        values = math.copysign(1, s) * distances.pow(-s)
    else:
        values = distances
    variance = values.var(correction=0)
    return HypersphericalEnergy(values.mean(), torch.where(values.isinf().any(), torch.inf, variance))
