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


# Below this many classes the products cost less than launching them: go to float64 at once.
_SMALL = 32
# Below this many classes the eigenproblem in float64 costs no more than in float32 with its repair. Above,
# half the time is worth a gradient error of 3e-6 instead of 2e-6.
_LARGE = 512
# Largest kappa at which a Gram matrix formed in the precision of the data (with the eigenproblem in float64,
# or not), or in float64 for float32 data, leaves the frame and its gradient accurate to that precision:
# kappa^2 eps against eps. Measured by benchmarks/bench_accuracy.py.
_KAPPA_SAME_PRECISION, _KAPPA_SAME_PRECISION_LARGE, _KAPPA_WIDER_PRECISION = 8.0, 6.0, 1e5


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
    overflow = torch.finfo(dtype).tiny ** 0.75
    return (rounding * singular_values.amax(-1, keepdim=True)).clamp_min(overflow)


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
    rows: Tensor  # centred, scaled
    scale: Tensor | None  # (..., 1, 1): what the rows were divided by
    basis: Tensor
    values: Tensor  # singular values of the scaled rows, ascending; NaN where rounding made a square negative


@dataclass(frozen=True)
class GramEigh:
    """Eigendecomposition of the K x K Gram matrix, for M whose centred rows have full rank K - 1.

    Args:
        dtype: precision of the products; ``None``: float64. The eigenproblem itself is solved in float64,
        unless
            there are 512 classes or more.

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
        smallest, largest = spectrum.values[..., 0], spectrum.values[..., -1]
        require_values(
            (smallest > (8 * torch.finfo(smallest.dtype).eps) ** 0.5 * largest).all(),
            "solver=GramEigh() needs class means of full rank (some coincide, or a class is unseen): use "
            "solver=SVD() or the default, or give anchor= and proximity= > 0",
            NonFiniteError,
        )
        return self.factors(spectrum)

    def spectrum(self, linear: Tensor) -> _GramSpectrum:
        """The eigenproblem alone, for a caller that looks at its values first."""
        num_classes = linear.shape[-2]
        dtype = self.dtype or torch.float64
        rows, scale = linear.to(dtype), None
        if dtype == linear.dtype:
            # No digits to spare: a large mean common to all rows must go before it is averaged.
            rows = rows - rows[..., :1, :]
        rows = centred(rows)
        if dtype == linear.dtype:
            # No range to spare: the Gram matrix of 1e20 overflows float32.
            scale = rows.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(dtype).tiny)
            rows = rows / scale
        gram = rows @ rows.mT
        # The filling of the null direction: the same number added to every entry has the eigenvector 1.
        filled = torch.add(gram, gram[..., :1, :1], alpha=0.5 / (num_classes - 1))
        if dtype == torch.float32 and num_classes >= _LARGE:
            eigenvalues, basis = torch.linalg.eigh(filled)
            # LAPACK's float32 eigenvectors are orthogonal to about 20 eps only. One Newton-Schulz step, two
            # K x K products, makes the frame and its gradient about twice as accurate.
            basis = 1.5 * basis - basis @ (0.5 * (basis.mT @ basis))
        else:
            eigenvalues, basis = torch.linalg.eigh(filled.double())
        return _GramSpectrum(rows, scale, basis.to(dtype), eigenvalues.sqrt().to(dtype))

    @staticmethod
    def factors(spectrum: _GramSpectrum) -> FrameFactors:
        """The frames, given the spectrum of the Gram matrix with every eigenvalue positive."""
        rows, scale, basis, values = spectrum
        radius = etf_radius(rows.shape[-2])
        inverse = _spectral(basis, radius / values)
        frame = inverse @ rows
        values = radius * values
        if scale is not None:
            inverse, values = inverse / scale, values * scale.squeeze(-1)
        return FrameFactors(frame, inverse, basis, _pair_sums(values).reciprocal())


@dataclass(frozen=True)
class ByRegime:
    """The cheapest accurate way: look at the condition number kappa of the centred means, then choose.

    Gram matrix in the precision of the data while kappa < 8 (6 from 512 classes on; skipped for fewer than
    32), in float64 while kappa < 1e5 (float32 data), else an SVD in float64. Where values cannot be read for
    free (on an accelerator, under ``torch.compile``, inside ``torch.func`` transforms) the choice is the SVD,
    always.

    >>> ByRegime()(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).frame
    tensor([[ 0.6000,  0.8000],
            [-0.6000, -0.8000]], dtype=torch.float64)
    """

    def __call__(self, linear: Tensor) -> FrameFactors:
        """The frames for ``linear`` (``(..., K, d)``), in the precision of the regime."""
        if reads_values(linear) and linear.numel() > 0:
            for dtype, largest_kappa in self._ladder(linear):
                gram = GramEigh(dtype)
                spectrum = gram.spectrum(linear)
                # Strictly, so that neither a zero nor a NaN spectrum passes.
                if bool((spectrum.values[..., -1] < largest_kappa * spectrum.values[..., 0]).all()):
                    return gram.factors(spectrum)
        return SVD()(linear)

    @staticmethod
    def _ladder(linear: Tensor) -> list[tuple[torch.dtype, float]]:
        num_classes = linear.shape[-2]
        same = _KAPPA_SAME_PRECISION if num_classes < _LARGE else _KAPPA_SAME_PRECISION_LARGE
        if linear.dtype == torch.float64:
            return [(torch.float64, same)]
        wider = [(torch.float64, _KAPPA_WIDER_PRECISION)]
        return wider if num_classes < _SMALL else [(torch.float32, same), *wider]
