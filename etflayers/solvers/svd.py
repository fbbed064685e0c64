"""The polar factor from a singular value decomposition in float64: for any rank and condition number."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from etflayers.geometry import centered_basis_adjoint, centered_basis_apply, etf_radius
from etflayers.solvers.polar import FrameFactors, FrameSolver, spectral_factors

__all__ = ["QRSVD", "SVD"]


@dataclass(frozen=True)
class SVD(FrameSolver):
    """Thin SVD of EM in float64: any rank, any condition number, no look at the values.

    For rank-deficient M many frames are equally good; this returns one of them, exactly a simplex ETF.

    >>> SVD()(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).frame
    tensor([[ 0.6000,  0.8000],
            [-0.6000, -0.8000]], dtype=torch.float64)
    """

    def __call__(self, linear: Tensor) -> FrameFactors:
        """The frames for ``linear`` (``(..., K, d)``), in float64."""
        # The transpose is tall and stands in memory as LAPACK wants it: up to twice as fast.
        right, values, left = torch.linalg.svd(centered_basis_apply(linear.double()).mT, full_matrices=False)
        return _factors((right @ left).mT, values, left.mT, linear.dtype)


@dataclass(frozen=True)
class QRSVD(FrameSolver):
    """SVD of the triangular factor of (EM)' = QR, in float64: the polar factor of EM is that of R' times Q'.

    Any rank and condition number, like :class:`SVD`, which also begins with a QR decomposition inside LAPACK
    but multiplies by Q twice. About a tenth faster for d >= 4 K, slower for d < 2 K (on a CPU).

    >>> QRSVD()(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).frame
    tensor([[ 0.6000,  0.8000],
            [-0.6000, -0.8000]], dtype=torch.float64)
    """

    def __call__(self, linear: Tensor) -> FrameFactors:
        """The frames for ``linear`` (``(..., K, d)``), in float64."""
        q, r = torch.linalg.qr(centered_basis_apply(linear.double()).mT)
        right, values, left = torch.linalg.svd(r)
        return _factors((right @ left).mT @ q.mT, values, left.mT, linear.dtype)


def _factors(factor: Tensor, values: Tensor, left: Tensor, dtype: torch.dtype) -> FrameFactors:
    """The factors for the polar factor, the singular values and the left singular vectors of EM."""
    radius = etf_radius(factor.shape[-2] + 1)
    return spectral_factors(
        radius * centered_basis_adjoint(factor), centered_basis_adjoint(left), radius * values, dtype
    )
