r"""The simplex ETF that maximizes <W, M> is a polar factor: what its solvers share.

**The polar factor.** With the frames written W = c E'Q' (see ``geometry.frames``), <W, M> = c <Q', EM> is
largest where Q' is the polar factor of EM. In rows, with M_c = CM the centered rows and
T = c (M_c M_c')^(1/2) (K x K, T 1 = 0), this reads

    W = c^2 T^+ M_c,        T = M_c W'.

**Factors.** Solvers hold no gradient code, but every derivative of W is a division in the eigenbasis of T.
A solver that factorizes M knows that basis. One that takes matrix products only knows T instead, with which
the adjoint solves the same equation by products. For one that finds only W it is the basis of T = M_c W', and
taking it checks W as well: a simplex ETF is the maximizer if and only if M_c W' is symmetric and has no
negative eigenvalue. (At the saddles of <W, M> it is symmetric with negative ones.)
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from etflayers.checks import require_values
from etflayers.errors import ConvergenceError
from etflayers.geometry import centered_basis_adjoint, centered_basis_apply, etf_radius

__all__ = ["FrameFactors", "FrameOnlySolver", "FrameSolver", "RootFactors", "factors_of", "rank_cutoff"]


class FrameFactors(NamedTuple):
    """The maximizing frame and what its derivative divides by, in the dtype in which they were computed.

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


class RootFactors(NamedTuple):
    """The maximizing frame from a solver that takes products only: T itself instead of its eigenbasis.

    Attributes:
        frame: W, ``(..., K, d)``.
        inverse: c^2 T^+, ``(..., K, K)`` float64; along 1 it may hold anything.
        root: T, ``(..., K, K)`` float64, zero along absent directions; along 1 it may hold any positive
        number.
    """

    frame: Tensor
    inverse: Tensor
    root: Tensor


class FrameSolver(Protocol):
    """Anything that finds the simplex ETFs that maximize <W, M> for a batch of M."""

    def __call__(self, linear: Tensor) -> FrameFactors | RootFactors:
        """The frames for ``linear`` (``(..., K, d)``, d >= K - 1, float32 or float64), and their factors."""
        ...

    def frame(self, linear: Tensor) -> Tensor:
        """The frames alone, for an adjoint that does not divide by the factors."""
        return self(linear).frame


@dataclass(frozen=True)
class FrameOnlySolver(FrameSolver):
    """Base of the solvers that find W without an eigenbasis of T: :func:`factors_of` adds it.

    Args:
        tolerance: largest relative error in the optimality conditions of W.
    """

    tolerance: float = 1e-5

    def __call__(self, linear: Tensor) -> FrameFactors:
        """The frames for ``linear`` (``(..., K, d)``), checked, and their factors."""
        return factors_of(self.frame(linear), linear, tolerance=self.tolerance)

    @abstractmethod
    def frame(self, linear: Tensor) -> Tensor:
        """The frames for ``linear`` (``(..., K, d)``)."""


def factors_of(frame: Tensor, linear: Tensor, *, tolerance: float = 1e-5) -> FrameFactors:
    """The factors of a frame that was found without them, by one eigenproblem; checks that it is optimal.

    Args:
        frame: W, ``(..., K, d)``, in the dtype to compute in.
        linear: M, ``(..., K, d)``.
        tolerance: largest relative deviation from WW' = c^2 C and from a symmetric, positive M_c W'.

    Returns:
        The factors, with ``frame`` as it is.

    Raises:
        ConvergenceError: W is not the simplex ETF that maximizes <W, M>.

    >>> linear = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    >>> factors_of(torch.tensor([[0.6, 0.8], [-0.6, -0.8]]), linear).divisors
    tensor([[0.1000]])
    """
    radius = etf_radius(frame.shape[-2])
    factor = centered_basis_apply(frame) / radius
    product = centered_basis_apply(linear.to(frame.dtype)) @ factor.mT
    gram = factor @ factor.mT
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    scale = tolerance * torch.linalg.matrix_norm(product)
    feasible = torch.linalg.matrix_norm(gram - identity) <= tolerance * gram.shape[-1] ** 0.5
    _require_optimal(feasible & (torch.linalg.matrix_norm(product - product.mT) <= scale), tolerance)
    values, left = torch.linalg.eigh((product + product.mT) / 2)
    _require_optimal(values[..., 0] >= -scale, tolerance)
    return spectral_factors(frame, centered_basis_adjoint(left), radius * values, linear.dtype)


def _require_optimal(optimal: Tensor, tolerance: float) -> None:
    require_values(
        optimal.all(),
        f"the solver returned a frame that is not the nearest simplex ETF within tolerance={tolerance:g}: "
        "give it more steps or a stricter stopping rule, or use solver=SVD() or the default",
        ConvergenceError,
    )


def spectral_factors(frame: Tensor, basis: Tensor, values: Tensor, dtype: torch.dtype) -> FrameFactors:
    """The factors from the eigenvectors ``basis`` and eigenvalues tau of T, for data of precision ``dtype``.

    Any rank. Absent directions are divided by 1 and then zeroed, so that no division by zero is ever
    differentiated.
    """
    num_classes, in_features = frame.shape[-2:]
    cutoff = rank_cutoff(values, in_features, dtype)
    present = values > cutoff
    # The mask first: a Python number times a mask would be rounded to float32.
    inverse = spectral(basis, present / torch.where(present, values, 1) * num_classes / (num_classes - 1))
    sums = pair_sums(values)
    pairs = sums > cutoff.unsqueeze(-1)
    return FrameFactors(frame, inverse, basis, pairs / torch.where(pairs, sums, 1))


def rank_cutoff(singular_values: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
    """The singular value below which a direction counts as absent from data of precision ``dtype``.

    Relative: rounding of the data, and of the factorization. Absolute: so small that dividing by it
    overflows.

    Args:
        singular_values: ``(..., n)`` in the precision of the factorization.
        in_features: d.
        dtype: of the data.

    Returns:
        ``(..., 1)``.
    """
    rounding = 8 * torch.finfo(dtype).eps + in_features * torch.finfo(singular_values.dtype).eps
    return (rounding * singular_values.amax(-1, keepdim=True)).clamp_min(smallest_divisor(dtype))


def smallest_divisor(dtype: torch.dtype) -> float:
    """A number so small that a gradient divided by a smaller one overflows data of precision ``dtype``."""
    return float(torch.finfo(dtype).tiny ** 0.75)


def spectral(basis: Tensor, values: Tensor) -> Tensor:
    """The symmetric matrix with eigenvectors ``basis`` and eigenvalues ``values``."""
    return (basis * values.unsqueeze(-2)) @ basis.mT


def pair_sums(values: Tensor) -> Tensor:
    """All sums of two values, ``(..., n, n)``."""
    return values.unsqueeze(-1) + values.unsqueeze(-2)
