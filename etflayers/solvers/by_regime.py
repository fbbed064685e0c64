"""The default solver: it looks at the condition number before it decides."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from etflayers.checks import reads_values
from etflayers.kernels.polar import FrameState, small_polar
from etflayers.solvers.frame_solver import FrameSolver
from etflayers.solvers.gram import GramEigh
from etflayers.solvers.gram_root import GramRoot
from etflayers.solvers.svd import QRSVD, SVD

__all__ = ["ByRegime"]

# Below this many classes a product costs less than its launch: float32 gains nothing over float64.
_SMALL = 32
# Condition numbers from which on a Gram matrix in float64 does not serve float32 and float64 data.
_KAPPA, _KAPPA_FLOAT64 = 1e5, 8.0
# Eigenvalues dispersed more than this have kappa > 5 as a rule (Gaussian or log-uniform singular values do),
# and an eigenproblem in float32 would be solved in vain. A wrong guess costs time and no digit.
_DISPERSION = 1.5


@dataclass(frozen=True)
class ByRegime(FrameSolver):
    """The cheapest accurate way: look at the condition number kappa of the centered means, then choose.

    The error of a Gram matrix is about kappa^2 eps of the precision in which it is formed and factorized;
    what is made of it afterwards has the error kappa eps. So, for float32 data:

    * all in float32 while kappa < 5 (6 from 512 classes on; fewer than 32 classes skip this step);
    * the eigenproblem in float64, the rest in float32 while kappa < 20 d / K (again from 32 classes on);
    * all in float64 while kappa < 1e5, for fewer than 32 classes in NumPy;
    * else an SVD in float64, after a QR decomposition if d >= 4 K.

    For float64 data: a Gram matrix while kappa < 8, else an SVD. Where values cannot be read for free (on an
    accelerator, under ``torch.compile``, inside ``torch.func`` transforms) the choice is the SVD, always; but
    on a CUDA device, where it would wait for the host, float32 data go through
    :class:`~etflayers.solvers.GramRoot`. The numbers come from ``benchmarks/bench_accuracy.py``: up to 500
    classes the gradient of float32 data is then within 2e-6 of the exact one, beyond within 3e-6.

    >>> ByRegime().solve(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).frame
    tensor([[ 0.6000,  0.8000],
            [-0.6000, -0.8000]], dtype=torch.float64)
    """

    def solve(self, linear: Tensor, precision: torch.dtype | None = None) -> FrameState:
        """The frames for ``linear`` (``(..., K, d)``), in the dtype of the regime."""
        precision = precision or linear.dtype
        num_classes, in_features = linear.shape[-2:]
        small = small_polar(linear, precision)
        if small is not None:
            *_, (_, largest_kappa) = _limits(torch.float64, num_classes, in_features, precision)
            if small.solved.kappa < largest_kappa:
                return small
        if reads_values(linear) and linear.numel() > 0:
            # Where NumPy has found kappa too large, the same eigenproblem would find it again.
            for dtype in _dtypes(num_classes, precision) if small is None else ():
                guessed = dtype == torch.float32
                gram = GramEigh(dtype).gram(linear, precision, scaled=not guessed)
                if guessed and not bool((gram.dispersion() < _DISPERSION).all()):
                    continue
                spectrum = gram.spectrum()
                margin = float(spectrum.margin(precision).detach().amin())
                for products, largest_kappa in _limits(dtype, num_classes, in_features, precision):
                    if margin * largest_kappa > 1:  # not so for NaN
                        return spectrum.state(products)
        if linear.device.type == "cuda" and precision == torch.float32 and linear.numel() > 0:
            return GramRoot().solve(linear, precision)
        return (QRSVD() if in_features >= 4 * num_classes else SVD()).solve(linear, precision)


def _dtypes(num_classes: int, precision: torch.dtype) -> tuple[torch.dtype, ...]:
    """Precisions of the eigenproblem to try in turn."""
    if precision == torch.float64 or num_classes < _SMALL:
        return (torch.float64,)
    return (torch.float32, torch.float64)


def _limits(
    dtype: torch.dtype, num_classes: int, in_features: int, precision: torch.dtype
) -> tuple[tuple[torch.dtype, float], ...]:
    """For an eigenproblem in ``dtype``: precisions of the rest, and up to which kappa each serves."""
    if precision == torch.float64:
        return ((torch.float64, _KAPPA_FLOAT64),)
    if dtype == torch.float32:
        return ((torch.float32, 5.0 if num_classes < 512 else 6.0),)
    mixed = 20 * in_features / num_classes if num_classes >= _SMALL else 0.0
    return ((torch.float32, mixed), (torch.float64, _KAPPA))
