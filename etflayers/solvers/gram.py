r"""The polar factor from the K x K Gram matrix of the centered rows.

**Gram or SVD.** T^+ (see ``solvers.polar``) needs one symmetric eigenproblem of size K, several times cheaper
than an SVD, but the Gram matrix squares the condition number kappa of EM: the error is about kappa^2 eps of
the precision in which it is formed. Its eigenvalues tell kappa, so a caller may look and then decide.

**The null direction.** M_c M_c' has the eigenvector 1 with eigenvalue zero, which no rounding may mix with a
small true eigenvalue. Since M_c has no component along it, any other eigenvalue may be put there without
changing T^+ M_c. |m_0|^2 K / (K - 1), the Rayleigh quotient of the centered first unit vector, lies among the
true ones; half of it is as harmless, and for K = 2 does not coincide with the only true one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from etflayers.checks import require_values
from etflayers.errors import NonFiniteError
from etflayers.geometry import etf_radius
from etflayers.solvers.polar import FrameFactors, FrameSolver, pair_sums, smallest_divisor, spectral

__all__ = ["GramEigh", "centered_rows"]


def centered_rows(linear: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """M_c in ``dtype``, divided by a scale ``(..., 1, 1)`` (``None`` for 1) so that M_c M_c' is finite."""
    rows = linear.to(dtype)
    if dtype == linear.dtype:
        # No digits to spare: a large mean common to all rows must go before it is averaged.
        rows = rows - rows[..., :1, :]
    # In place, on a tensor of our own by now: to touch fresh memory costs as much as the arithmetic.
    rows -= rows.mean(-2, keepdim=True)
    if dtype != linear.dtype:
        return rows, None
    # No range to spare either: the Gram matrix of 1e20 overflows float32.
    scale = rows.detach().abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(dtype).tiny)
    rows /= scale
    return rows, scale


class _GramSpectrum(NamedTuple):
    rows: Tensor  # M_c / scale
    scale: Tensor | None  # (..., 1, 1), None for 1
    basis: Tensor  # eigenvectors of the Gram matrix of the rows, in columns
    values: Tensor  # roots of its eigenvalues, ascending; NaN where rounding made one negative

    def margin(self, dtype: torch.dtype) -> Tensor:
        """1 / kappa for each member of the batch; not positive where the inverse overflows ``dtype``."""
        floor = smallest_divisor(dtype)
        smallest = floor if self.scale is None else floor / self.scale.squeeze((-2, -1))
        return (self.values[..., 0] - smallest) / self.values[..., -1]

    def factors(self) -> FrameFactors:
        """The frames, if every eigenvalue is positive."""
        radius = etf_radius(self.rows.shape[-2])
        inverse, values = spectral(self.basis, radius / self.values), radius * self.values
        frame = inverse @ self.rows
        if self.scale is not None:
            inverse, values = inverse / self.scale, values * self.scale.squeeze(-1)
        return FrameFactors(frame, inverse, self.basis, pair_sums(values).reciprocal())


@dataclass(frozen=True)
class GramEigh(FrameSolver):
    """Eigendecomposition of the K x K Gram matrix, for M whose centered rows have full rank K - 1.

    Args:
        dtype: precision to compute in; ``None``: float64.

    Raises:
        NonFiniteError: M is so ill-conditioned that its Gram matrix is singular in this precision.

    >>> GramEigh()(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).frame
    tensor([[ 0.6000,  0.8000],
            [-0.6000, -0.8000]], dtype=torch.float64)
    """

    dtype: torch.dtype | None = None

    def __call__(self, linear: Tensor) -> FrameFactors:
        """The frames for ``linear`` (``(..., K, d)``), in ``self.dtype``."""
        spectrum = self.spectrum(linear)
        require_values(
            (spectrum.margin(linear.dtype) > (8 * torch.finfo(spectrum.rows.dtype).eps) ** 0.5).all(),
            "solver=GramEigh() needs class means of full rank (some coincide, or a class is unseen): use "
            "solver=SVD() or the default, or give anchor= and proximity= > 0",
            NonFiniteError,
        )
        return spectrum.factors()

    def spectrum(self, linear: Tensor) -> _GramSpectrum:
        """The eigenproblem alone, for a caller that looks at its values first."""
        num_classes = linear.shape[-2]
        rows, scale = centered_rows(linear, self.dtype or torch.float64)
        gram = rows @ rows.mT
        # The filling of the null direction: the same number added to every entry has the eigenvector 1.
        filled = torch.add(gram, gram[..., :1, :1], alpha=0.5 / (num_classes - 1))
        eigenvalues, basis = torch.linalg.eigh(filled)
        if rows.dtype == torch.float32:
            # LAPACK's float32 eigenvectors are orthogonal to about 20 eps only. One Newton-Schulz step, two
            # K x K products, makes the frame and its gradient about twice as accurate.
            basis = 1.5 * basis - basis @ (0.5 * (basis.mT @ basis))
        return _GramSpectrum(rows, scale, basis, eigenvalues.sqrt())
