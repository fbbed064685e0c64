r"""The polar factor from the K x K Gram matrix of the centered rows.

**Gram or SVD.** T^+ (see ``solvers.state``) needs one symmetric eigenproblem of size K, several times cheaper
than an SVD, but the Gram matrix squares the condition number kappa of EM: the error is about kappa^2 eps of
the precision in which it is formed. Its eigenvalues tell kappa, so a caller may look and then decide.

**The null direction.** M_c M_c' has the eigenvector 1 with eigenvalue zero, which no rounding may mix with a
small true eigenvalue. Since M_c has no component along it, any other eigenvalue may be put there without
changing T^+ M_c. |m_0|^2 K / (K - 1), the Rayleigh quotient of the centered first unit vector, lies among the
true ones; half of it is as harmless, and for K = 2 does not coincide with the only true one.

**float32.** LAPACK's eigenvectors V are orthogonal to about 20 eps and diagonalize the Gram matrix G no
better, which is most of the error that is left. One Newton-Schulz step each, in K x K products, mends both:
V <- V (3 I - V'V) / 2, and for Z = G^(-1/2), Z <- Z (3 I - G Z^2) / 2.

M <-> linear, M_c / scale <-> rows, G with its null direction filled <-> gram, V <-> basis, c <-> radius,
c^2 T^+ <-> inverse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from etflayers.checks import require_values
from etflayers.errors import NonFiniteError
from etflayers.geometry import centered_rows, etf_radius
from etflayers.linalg import Eigenbasis, pair_sums, spectral
from etflayers.precision import smallest_divisor
from etflayers.solvers.frame_solver import FrameSolver
from etflayers.solvers.state import SpectralState

__all__ = ["GramEigh", "GramSpectrum"]


class GramSpectrum(NamedTuple):
    """The eigenproblem of a Gram matrix.

    Attributes:
        rows: M_c / scale, ``(..., K, d)``.
        scale: ``(..., 1, 1)``, ``None`` for 1.
        gram: of the rows, with its null direction filled, ``(..., K, K)``.
        basis: its eigenvectors, in columns.
        values: roots of its eigenvalues, ascending; NaN where rounding made one negative.
    """

    rows: Tensor
    scale: Tensor | None
    gram: Tensor
    basis: Tensor
    values: Tensor

    def margin(self, precision: torch.dtype) -> Tensor:
        """1 / kappa for each member of the batch; not positive where the inverse overflows ``precision``."""
        floor = smallest_divisor(precision)
        smallest = floor if self.scale is None else floor / self.scale.squeeze((-2, -1))
        return (self.values[..., 0] - smallest) / self.values[..., -1]

    def state(self, *, polished: bool) -> SpectralState:
        """The frames, if every eigenvalue is positive; ``polished``: with a step for the inverse root."""
        radius = etf_radius(self.rows.shape[-2])
        if polished:
            inverse = spectral(self.basis, self.values.reciprocal())
            inverse = radius * (1.5 * inverse - inverse @ (0.5 * (self.gram @ inverse @ inverse)))
        else:
            inverse = spectral(self.basis, radius / self.values)
        values = radius * self.values
        frame = inverse @ self.rows
        if self.scale is not None:
            inverse, values = inverse / self.scale, values * self.scale.squeeze(-1)
        return SpectralState(frame, inverse, Eigenbasis(self.basis, pair_sums(values).reciprocal()))


@dataclass(frozen=True)
class GramEigh(FrameSolver):
    """Eigendecomposition of the K x K Gram matrix, for M whose centered rows have full rank K - 1.

    Args:
        dtype: precision to compute in; ``None``: float64.

    Raises:
        NonFiniteError: M is so ill-conditioned that its Gram matrix is singular in this precision.

    >>> GramEigh().solve(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).frame
    tensor([[ 0.6000,  0.8000],
            [-0.6000, -0.8000]], dtype=torch.float64)
    """

    dtype: torch.dtype | None = None

    def solve(self, linear: Tensor, precision: torch.dtype | None = None) -> SpectralState:
        """The frames for ``linear`` (``(..., K, d)``), in ``self.dtype``."""
        precision = precision or linear.dtype
        spectrum = self.spectrum(linear, precision)
        require_values(
            (spectrum.margin(precision) > (8 * torch.finfo(spectrum.rows.dtype).eps) ** 0.5).all(),
            "solver=GramEigh() needs class means of full rank (some coincide, or a class is unseen): use "
            "solver=SVD() or the default, or give anchor= and proximity= > 0",
            NonFiniteError,
        )
        return spectrum.state(polished=spectrum.rows.dtype == torch.float32)

    def spectrum(self, linear: Tensor, precision: torch.dtype) -> GramSpectrum:
        """The eigenproblem alone, for a caller that looks at its values first."""
        num_classes = linear.shape[-2]
        rows, scale = centered_rows(linear, self.dtype or torch.float64, precision=precision)
        gram = rows @ rows.mT
        # The filling of the null direction: the same number added to every entry has the eigenvector 1.
        filled = torch.add(gram, gram[..., :1, :1], alpha=0.5 / (num_classes - 1))
        eigenvalues, basis = torch.linalg.eigh(filled)
        if rows.dtype == torch.float32:
            basis = 1.5 * basis - basis @ (0.5 * (basis.mT @ basis))
        return GramSpectrum(rows, scale, filled, basis, eigenvalues.sqrt())
