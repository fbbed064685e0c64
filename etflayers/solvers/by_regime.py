"""The default solver: it looks at the condition number before it decides."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from etflayers.checks import reads_values
from etflayers.kernels.polar import FrameState
from etflayers.solvers.frame_solver import FrameSolver
from etflayers.solvers.gram import GramEigh
from etflayers.solvers.gram_root import GramRoot
from etflayers.solvers.svd import QRSVD, SVD

__all__ = ["ByRegime"]

# Below this many classes a product costs less than its launch: float32 gains nothing over float64.
_SMALL = 32
# In float32, from this many classes or this kappa on, the rounding of the eigenvectors has to be mended.
_LARGE = 128
_ROUNDED_KAPPA = 2.0


@dataclass(frozen=True)
class ByRegime(FrameSolver):
    """The cheapest accurate way: look at the condition number kappa of the centered means, then choose.

    The error of a Gram matrix is about kappa^2 eps of the precision in which it is formed. So, for float32
    data: in float32 while kappa < 4.4 (6 from 512 classes on; fewer than 32 classes skip this step), in
    float64 while kappa < 1e5, else an SVD in float64, after a QR decomposition if d >= 4 K. For float64
    data: a Gram matrix while kappa < 8, else an SVD. Where values cannot be read for free (on an accelerator,
    under ``torch.compile``, inside ``torch.func`` transforms) the choice is the SVD, always; but on a CUDA
    device, where it would wait for the host, float32 data go through :class:`~etflayers.solvers.GramRoot`.
    The numbers come from ``benchmarks/bench_accuracy.py``: up to 500 classes the gradient of float32 data is
    then within 2e-6 of the exact one; beyond within 3e-6, which buys half of the time.

    >>> ByRegime().solve(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).frame
    tensor([[ 0.6000,  0.8000],
            [-0.6000, -0.8000]], dtype=torch.float64)
    """

    def solve(self, linear: Tensor, precision: torch.dtype | None = None) -> FrameState:
        """The frames for ``linear`` (``(..., K, d)``), in the dtype of the regime."""
        precision = precision or linear.dtype
        num_classes, in_features = linear.shape[-2:]
        if reads_values(linear) and linear.numel() > 0:
            for dtype, largest_kappa in _ladder(num_classes, precision):
                spectrum = GramEigh(dtype).spectrum(linear, precision)
                margin = float(spectrum.margin(precision).detach().amin())
                if margin * largest_kappa > 1:  # not so for NaN
                    polished = dtype == torch.float32 and not (
                        num_classes < _LARGE and margin * _ROUNDED_KAPPA > 1
                    )
                    return spectrum.state(polished=polished)
        if linear.device.type == "cuda" and precision == torch.float32 and linear.numel() > 0:
            return GramRoot().solve(linear, precision)
        return (QRSVD() if in_features >= 4 * num_classes else SVD()).solve(linear, precision)


def _ladder(num_classes: int, precision: torch.dtype) -> list[tuple[torch.dtype, float]]:
    """Dtypes of the Gram matrix to try in turn, each with the kappa from which on it does not serve."""
    if precision == torch.float64:
        return [(torch.float64, 8.0)]
    wider = [(torch.float64, 1e5)]
    if num_classes < _SMALL:
        return wider
    return [(torch.float32, 4.4 if num_classes < 512 else 6.0), *wider]
