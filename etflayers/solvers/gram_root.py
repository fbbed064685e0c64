"""The polar factor on a device: from the Gram matrix by products alone, any rank, no look at a value."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from etflayers.kernels.dispatch import Impl
from etflayers.kernels.polar import RootState, polar
from etflayers.solvers.frame_solver import FrameSolver

__all__ = ["GramRoot"]


@dataclass(frozen=True)
class GramRoot(FrameSolver):
    """Newton-Schulz on the Gram matrix in float64, for any rank: what a GPU does without waiting.

    A fixed number of products and no factorization, so that it can be captured in a CUDA graph; up to 32
    classes of float32 data one Triton kernel does it all, where Triton is installed. The derivative takes
    products only as well; the operations themselves carry none, so that ``adjoint=Unrolled()`` is an error.
    On a CPU it is slower than :class:`~etflayers.solvers.ByRegime`.

    The relative error is about 1e-16 kappa^2 for a condition number kappa of the centered means. Directions
    with less than about 1e-6 of the largest singular value count as absent, also for float64 data, for which
    :class:`~etflayers.solvers.SVD` tells them from zero. For rank-deficient M many frames are equally good;
    this returns one of them, a simplex ETF to within 1e-10.

    Args:
        impl: ``"auto"``: the kernel where it can run. ``"reference"``: PyTorch operations. ``"triton"``: the
            kernel, or an error.

    Raises:
        InvalidArgumentError: ``impl="triton"`` where the kernel cannot run:
            :func:`~etflayers.kernels.describe` says why.
        ConvergenceError: the means are not finite.

    >>> GramRoot().solve(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).frame
    tensor([[ 0.6000,  0.8000],
            [-0.6000, -0.8000]], dtype=torch.float64)
    """

    impl: Impl = "auto"

    def solve(self, linear: Tensor, precision: torch.dtype | None = None) -> RootState:
        """The frames for ``linear`` (``(..., K, d)``): float64, or in its own dtype from the kernel."""
        return polar(linear, precision=precision, impl=self.impl)
