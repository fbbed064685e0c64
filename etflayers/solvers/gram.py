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
V <- V (3 I - V'V) / 2, and for Z = G^(-1/2), Z <- Z (3 I - G Z^2) / 2. The error grows with K and K / d. The
step for Z alone is enough for 2e-6 up to d = 2 K, both are up to 500 classes; from 512 classes on, where a
step costs as much as a product of size d, the one for V alone keeps 3e-6.

**Mixed.** The error kappa^2 eps arises where the Gram matrix is formed and factorized. What is made of that,
T^+ and products with it, adds kappa eps only. With the first in float64 and the rest in float32 the gradient
has an error of 4e-8 kappa K / d, and costs a quarter more than all in float32.

M <-> linear, M_c / scale <-> rows, G with its null direction filled <-> gram, V <-> basis, c <-> radius,
Z or c^2 T^+ <-> inverse.
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
from etflayers.linalg.newton_schulz import add_product
from etflayers.precision import smallest_divisor
from etflayers.solvers.frame_solver import FrameSolver
from etflayers.solvers.state import SpectralState

__all__ = ["CenteredGram", "GramEigh", "GramSpectrum"]

# From this many classes on, the eigenvectors are mended and the inverse root is not.
_MANY = 512


class CenteredGram(NamedTuple):
    """A Gram matrix before its eigenproblem.

    Attributes:
        rows: M_c / scale, ``(..., K, d)``.
        scale: ``(..., 1, 1)``, ``None`` for 1.
        gram: of the rows, with its null direction filled, ``(..., K, K)``.
    """

    rows: Tensor
    scale: Tensor | None
    gram: Tensor

    def dispersion(self) -> Tensor:
        """Mean square of the eigenvalues over their squared mean, ``(...)``: 1 where all agree.

        By Kantorovich's inequality it is at most (kappa + 1 / kappa)^2 / 4; for Gaussian means it is 1 + K/d.
        """
        mean = self.gram.diagonal(dim1=-2, dim2=-1).mean(-1)
        found: Tensor = torch.linalg.matrix_norm(self.gram).square() / (self.gram.shape[-1] * mean.square())
        return found

    def spectrum(self) -> GramSpectrum:
        """The eigenproblem."""
        eigenvalues, basis = torch.linalg.eigh(self.gram)
        return GramSpectrum(*self, basis, eigenvalues.sqrt())


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

    def state(self, dtype: torch.dtype) -> SpectralState:
        """The frames, if no eigenvalue is zero; what is not of the eigenproblem is computed in ``dtype``."""
        num_classes, in_features = self.rows.shape[-2:]
        radius, basis, values = etf_radius(num_classes), self.basis, self.values
        in_float32 = basis.dtype == torch.float32
        if in_float32 and (num_classes >= _MANY or 2 * num_classes > in_features):
            basis = add_product(basis, basis, basis.mT @ basis, beta=1.5, alpha=-0.5)
        inverse = spectral(basis, values.reciprocal())
        if in_float32 and num_classes < _MANY:
            inverse = add_product(inverse, inverse @ (self.gram @ inverse), inverse, beta=1.5, alpha=-0.5)
        # Less the null direction: T^+ 1 = 0.
        inverse = radius * (inverse - inverse.mean(-1, keepdim=True))
        basis, inverse, values = basis.to(dtype), inverse.to(dtype), (radius * values).to(dtype)
        frame = inverse @ self.rows.to(dtype)
        if self.scale is not None:
            inverse, values = inverse / self.scale, values * self.scale.squeeze(-1)
        return SpectralState(frame, inverse, Eigenbasis(basis, pair_sums(values).reciprocal()))


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
        spectrum = self.gram(linear, precision).spectrum()
        require_values(
            (spectrum.margin(precision) > (8 * torch.finfo(spectrum.rows.dtype).eps) ** 0.5).all(),
            "solver=GramEigh() needs class means of full rank (some coincide, or a class is unseen): use "
            "solver=SVD() or the default, or give anchor= and proximity= > 0",
            NonFiniteError,
        )
        return spectrum.state(spectrum.rows.dtype)

    def gram(self, linear: Tensor, precision: torch.dtype, *, scaled: bool = True) -> CenteredGram:
        """The Gram matrix alone, for a caller that looks before it has the eigenproblem solved.

        Args:
            linear: M, ``(..., K, d)``.
            precision: of the data.
            scaled: as in :func:`~etflayers.geometry.centered_rows`; ``False`` for a caller that looks at the
                dispersion, which is not finite where the Gram matrix overflows or vanishes.
        """
        num_classes = linear.shape[-2]
        rows, scale = centered_rows(linear, self.dtype or torch.float64, precision=precision, scaled=scaled)
        gram = rows @ rows.mT
        # The filling of the null direction: the same number added to every entry has the eigenvector 1.
        filled = torch.add(gram, gram[..., :1, :1], alpha=0.5 / (num_classes - 1))
        return CenteredGram(rows, scale, filled)
