r"""The simplex ETF that maximises <W, M>: a polar factor, found by a symmetric eigenproblem or an SVD.

**The polar factor.** With the frames written W = c E'Q' (see ``geometry.frames``), <W, M> = c <Q', EM> is
largest where Q' is the polar factor of EM. In rows, with M_c = CM the centred rows and
T = c (M_c M_c')^(1/2) (K x K, T 1 = 0), this reads

    W = c^2 T^+ M_c,        T = M_c W'.

Solvers hold no gradient code; they return the eigenbasis of T as well, because every derivative of W is a
division in that basis.

**Gram or SVD.** T^+ needs one symmetric eigenproblem of size K, several times cheaper than an SVD, but the
Gram matrix squares the condition number kappa of EM: the error is about kappa^2 eps of the precision in which
it is formed. Its eigenvalues tell kappa, so :class:`ByRegime` looks and then decides.

**The null direction.** M_c M_c' has the eigenvector 1 with eigenvalue zero, which no rounding may mix with a
small true eigenvalue. Since M_c has no component along it, any other eigenvalue may be put there without
changing T^+ M_c. |m_0|^2 K / (K - 1), the Rayleigh quotient of the centred first unit vector, lies among the
true ones; half of it is as harmless, and for K = 2 does not coincide with the only true one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from etflayers.errors import NonFiniteError, reads_values, require_values
from etflayers.geometry import centred, centred_basis_adjoint, centred_basis_apply, etf_radius

__all__ = ["SVD", "ByRegime", "FrameFactors", "FrameSolver", "GramEigh", "rank_cutoff"]


class FrameFactors(NamedTuple):
    """The maximising frame and what its derivative divides by, in the dtype in which they were computed.

    Attributes:
        frame: W, ``(..., K, d)``.
        inverse: c^2 T^+, ``(..., K, K)``; along 1 it may hold anything.
        basis: V, ``(..., K, r)``, orthonormal eigenvectors of T, r = K - 1, or r = K with 1 among them.
        divisors: 1 / (tau_i + tau_j) for the eigenvalues tau of T, ``(..., r, r)``, zero for pairs of absent
            directions.
    """

    frame: Tensor
    inverse: Tensor
    basis: Tensor
    divisors: Tensor


class FrameSolver(Protocol):
    """Anything that finds the simplex ETFs that maximise <W, M> for a batch of M."""

    def __call__(self, linear: Tensor) -> FrameFactors:
        """The frames for ``linear`` (``(..., K, d)``, d >= K - 1, float32 or float64)."""
        ...


def rank_cutoff(singular_values: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
    """The singular value below which a direction counts as absent from data of precision ``dtype``.

    Relative: rounding of the data, and of the factorisation. Absolute: so small that dividing by it
    overflows.

    Args:
        singular_values: ``(..., n)`` in the precision of the factorisation.
        in_features: d.
        dtype: of the data.

    Returns:
        ``(..., 1)``.
    """
    rounding = 8 * torch.finfo(dtype).eps + in_features * torch.finfo(singular_values.dtype).eps
    return (rounding * singular_values.amax(-1, keepdim=True)).clamp_min(_smallest_divisor(dtype))


def _smallest_divisor(dtype: torch.dtype) -> float:
    """A number so small that a gradient divided by a smaller one overflows data of precision ``dtype``."""
    return float(torch.finfo(dtype).tiny ** 0.75)


def _spectral(basis: Tensor, values: Tensor) -> Tensor:
    """The symmetric matrix with eigenvectors ``basis`` and eigenvalues ``values``."""
    return (basis * values.unsqueeze(-2)) @ basis.mT


def _pair_sums(values: Tensor) -> Tensor:
    return values.unsqueeze(-1) + values.unsqueeze(-2)


@dataclass(frozen=True)
class SVD:
    """Thin SVD of EM in float64: any rank, any condition number, no look at the values.

    For rank-deficient M many frames are equally good; this returns one of them, exactly a simplex ETF.

    >>> SVD()(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).frame
    tensor([[ 0.6000,  0.8000],
            [-0.6000, -0.8000]], dtype=torch.float64)
    """

    def __call__(self, linear: Tensor) -> FrameFactors:
        """The frames for ``linear`` (``(..., K, d)``), in float64."""
        num_classes, in_features = linear.shape[-2:]
        radius = etf_radius(num_classes)
        left, values, right = torch.linalg.svd(centred_basis_apply(linear.double()), full_matrices=False)
        frame, basis = radius * centred_basis_adjoint(left @ right), centred_basis_adjoint(left)
        values = radius * values
        # Absent directions are divided by 1 and then zeroed, so that no division by zero is ever
        # differentiated.
        cutoff = rank_cutoff(values, in_features, linear.dtype)
        present = values > cutoff
        inverse = _spectral(basis, radius**2 * present / torch.where(present, values, 1))
        sums = _pair_sums(values)
        pairs = sums > cutoff.unsqueeze(-1)
        return FrameFactors(frame, inverse, basis, pairs / torch.where(pairs, sums, 1))


class _GramSpectrum(NamedTuple):
    rows: Tensor  # M_c
    basis: Tensor  # eigenvectors of M_c M_c' in columns
    values: Tensor  # roots of its eigenvalues, ascending; NaN where rounding made one negative

    def to(self, dtype: torch.dtype) -> _GramSpectrum:
        return _GramSpectrum(*(part.to(dtype) for part in self))

    def margin(self, dtype: torch.dtype) -> Tensor:
        """1 / kappa for each member of the batch; not positive where the inverse overflows ``dtype``."""
        return (self.values[..., 0] - _smallest_divisor(dtype)) / self.values[..., -1]

    def factors(self) -> FrameFactors:
        radius = etf_radius(self.rows.shape[-2])
        inverse = _spectral(self.basis, radius / self.values)
        return FrameFactors(
            inverse @ self.rows, inverse, self.basis, _pair_sums(radius * self.values).reciprocal()
        )


# From this many classes on, float32 halves the time of the eigenproblem, which is then most of the whole, and
# that is worth a gradient error of 3e-6 instead of 1e-6.
_LARGE = 512
# From this many classes on, a product in float32 is cheaper than one in float64. Below, launching it costs
# more.
_MEDIUM = 32


@dataclass(frozen=True)
class GramEigh:
    """Eigendecomposition of the K x K Gram matrix, for M whose centred rows have full rank K - 1.

    Args:
        dtype: precision of the products, and from 512 classes on of the eigenproblem, which is otherwise
        solved
            in float64; ``None``: float64.

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
            (spectrum.margin(linear.dtype) > (8 * torch.finfo(spectrum.values.dtype).eps) ** 0.5).all(),
            "solver=GramEigh() needs class means of full rank (some coincide, or a class is unseen): use "
            "solver=SVD() or the default, or give anchor= and proximity= > 0",
            NonFiniteError,
        )
        return spectrum.factors()

    def spectrum(self, linear: Tensor) -> _GramSpectrum:
        """The eigenproblem alone, for a caller that looks at its values first."""
        num_classes = linear.shape[-2]
        dtype = self.dtype or torch.float64
        rows = linear.to(dtype)
        if dtype == linear.dtype:
            # No digits to spare: a large mean common to all rows must go before it is averaged. No range to
            # spare either: the Gram matrix of 1e20 overflows float32.
            rows = centred(rows - rows[..., :1, :])
            scale = rows.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(dtype).tiny)
            unit = rows / scale
        else:
            unit = rows = centred(rows)
        gram = unit @ unit.mT
        # The filling of the null direction: the same number added to every entry has the eigenvector 1.
        filled = torch.add(gram, gram[..., :1, :1], alpha=0.5 / (num_classes - 1))
        if dtype == torch.float32 and num_classes >= _LARGE:
            eigenvalues, basis = torch.linalg.eigh(filled)
            # LAPACK's float32 eigenvectors are orthogonal to about 20 eps only. One Newton-Schulz step, two
            # K x K products, makes the frame and its gradient about twice as accurate.
            basis = 1.5 * basis - basis @ (0.5 * (basis.mT @ basis))
        else:
            eigenvalues, basis = torch.linalg.eigh(filled.double())
        values = eigenvalues.sqrt()
        if unit is not rows:
            values = values * scale.squeeze(-1)
        return _GramSpectrum(rows, basis.to(dtype), values.to(dtype))


# Largest kappa at which the frame and its gradient keep the accuracy of the data, kappa^2 eps against eps, by
# the precisions of the data and of the Gram matrix; and at which products in float32 do. Measured by
# benchmarks/bench_accuracy.py.
_KAPPA = {
    (torch.float32, torch.float32): 6.0,
    (torch.float32, torch.float64): 1e5,
    (torch.float64, torch.float64): 8.0,
}
_KAPPA_PRODUCTS = 10.0


@dataclass(frozen=True)
class ByRegime:
    """The cheapest accurate way: look at the condition number kappa of the centred means, then choose.

    For float32 data: a Gram matrix in float64 while kappa < 1e5 (in float32 from 512 classes on, while
    kappa < 6), and from 32 classes on the other products in float32 while kappa < 10; else an SVD in float64.
    For float64 data: a Gram matrix while kappa < 8, else an SVD. Where values cannot be read for free (on an
    accelerator, under ``torch.compile``, inside ``torch.func`` transforms) the choice is the SVD, always.

    >>> ByRegime()(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).frame
    tensor([[ 0.6000,  0.8000],
            [-0.6000, -0.8000]], dtype=torch.float64)
    """

    def __call__(self, linear: Tensor) -> FrameFactors:
        """The frames for ``linear`` (``(..., K, d)``), in the precision of the regime."""
        data, num_classes = linear.dtype, linear.shape[-2]
        if not reads_values(linear) or linear.numel() == 0:
            return SVD()(linear)
        single = data == torch.float32
        for dtype in (torch.float32, torch.float64) if single and num_classes >= _LARGE else (torch.float64,):
            spectrum = GramEigh(dtype).spectrum(linear)
            margin = float(spectrum.margin(data).detach().amin())  # NaN passes no comparison
            if margin * _KAPPA[data, dtype] > 1:
                if single and num_classes >= _MEDIUM and margin * _KAPPA_PRODUCTS > 1:
                    spectrum = spectrum.to(data)
                return spectrum.factors()
        return SVD()(linear)
