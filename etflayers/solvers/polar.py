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
from etflayers.geometry import centred_basis_adjoint, centred_basis_apply, etf_radius

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
    rows: Tensor  # M_c / scale
    scale: Tensor | None  # (..., 1, 1), None for 1
    basis: Tensor  # eigenvectors of the Gram matrix of the rows, in columns
    values: Tensor  # roots of its eigenvalues, ascending; NaN where rounding made one negative

    def margin(self, dtype: torch.dtype) -> Tensor:
        """1 / kappa for each member of the batch; not positive where the inverse overflows ``dtype``."""
        floor = _smallest_divisor(dtype)
        smallest = floor if self.scale is None else floor / self.scale.squeeze((-2, -1))
        return (self.values[..., 0] - smallest) / self.values[..., -1]

    def factors(self) -> FrameFactors:
        """The frames, if every eigenvalue is positive."""
        radius = etf_radius(self.rows.shape[-2])
        inverse, values = _spectral(self.basis, radius / self.values), radius * self.values
        frame = inverse @ self.rows
        if self.scale is not None:
            inverse, values = inverse / self.scale, values * self.scale.squeeze(-1)
        return FrameFactors(frame, inverse, self.basis, _pair_sums(values).reciprocal())


# Below this many classes a product costs less than its launch: float32 gains nothing over float64.
_SMALL = 32


@dataclass(frozen=True)
class GramEigh:
    """Eigendecomposition of the K x K Gram matrix, for M whose centred rows have full rank K - 1.

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
        dtype = self.dtype or torch.float64
        rows, scale = linear.to(dtype), None
        if dtype == linear.dtype:
            # No digits to spare: a large mean common to all rows must go before it is averaged.
            rows = rows - rows[..., :1, :]
        # In place, on a tensor of our own by now: to touch fresh memory costs as much as the arithmetic.
        rows -= rows.mean(-2, keepdim=True)
        if dtype == linear.dtype:
            # No range to spare either: the Gram matrix of 1e20 overflows float32.
            scale = rows.detach().abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(dtype).tiny)
            rows /= scale
        gram = rows @ rows.mT
        # The filling of the null direction: the same number added to every entry has the eigenvector 1.
        filled = torch.add(gram, gram[..., :1, :1], alpha=0.5 / (num_classes - 1))
        eigenvalues, basis = torch.linalg.eigh(filled)
        if dtype == torch.float32:
            # LAPACK's float32 eigenvectors are orthogonal to about 20 eps only. One Newton-Schulz step, two
            # K x K products, makes the frame and its gradient about twice as accurate.
            basis = 1.5 * basis - basis @ (0.5 * (basis.mT @ basis))
        return _GramSpectrum(rows, scale, basis, eigenvalues.sqrt())


@dataclass(frozen=True)
class ByRegime:
    """The cheapest accurate way: look at the condition number kappa of the centred means, then choose.

    The error of a Gram matrix is about kappa^2 eps of the precision in which it is formed. So, for float32
    data: in float32 while kappa < 4.5 (6 from 512 classes on; fewer than 32 classes skip this step), in
    float64 while kappa < 1e5, else an SVD in float64. For float64 data: a Gram matrix while kappa < 8, else
    an SVD. Where values cannot be read for free (on an accelerator, under ``torch.compile``, inside
    ``torch.func`` transforms) the choice is the SVD, always. The numbers come from
    ``benchmarks/bench_accuracy.py``: up to 500 classes the gradient of float32 data is then within 2e-6 of
    the exact one; beyond within 3e-6, which buys half of the time.

    >>> ByRegime()(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).frame
    tensor([[ 0.6000,  0.8000],
            [-0.6000, -0.8000]], dtype=torch.float64)
    """

    def __call__(self, linear: Tensor) -> FrameFactors:
        """The frames for ``linear`` (``(..., K, d)``), in the precision of the regime."""
        if reads_values(linear) and linear.numel() > 0:
            for dtype, largest_kappa in _ladder(linear):
                spectrum = GramEigh(dtype).spectrum(linear)
                margin = float(spectrum.margin(linear.dtype).detach().amin())
                if margin * largest_kappa > 1:  # not so for NaN
                    return spectrum.factors()
        return SVD()(linear)


def _ladder(linear: Tensor) -> list[tuple[torch.dtype, float]]:
    """Precisions of the Gram matrix to try in turn, each with the kappa from which on it does not serve."""
    num_classes = linear.shape[-2]
    if linear.dtype == torch.float64:
        return [(torch.float64, 8.0)]
    wider = [(torch.float64, 1e5)]
    if num_classes < _SMALL:
        return wider
    return [(torch.float32, 4.5 if num_classes < 512 else 6.0), *wider]
