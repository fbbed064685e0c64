r"""The simplex ETF that maximizes <W, M> is a polar factor: what its solvers return.

**The polar factor.** With the frames written W = c E'Q' (see ``geometry.frames``), <W, M> = c <Q', EM> is
largest where Q' is the polar factor of EM. In rows, with M_c = CM the centered rows and
T = c (M_c M_c')^(1/2) (K x K, T 1 = 0), this reads

    W = c^2 T^+ M_c,        T = M_c W'.

**States.** Solvers hold no gradient code, but every derivative of W applies T^+ and solves T X + X T = S. A
solver that factorizes M knows the eigenbasis of T, and answers with a
:class:`~etflayers.kernels.polar.SpectralState`. One that takes matrix products only knows T instead, and
answers by products (:class:`~etflayers.kernels.polar.RootState`). For one that finds only W it is the
eigenbasis of T = M_c W', and taking it checks W as well: a simplex ETF is the maximizer if and only if M_c W'
is symmetric and has no negative eigenvalue. (At the saddles of <W, M> it is symmetric with negative ones.)
That is left until somebody asks: :class:`FoundState`.

M <-> linear, W <-> frame, c <-> radius, c^2 T^+ <-> inverse, V, tau <-> basis, values, Q' <-> factor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from etflayers.checks import require_values
from etflayers.errors import ConvergenceError
from etflayers.geometry import centered_basis_adjoint, centered_basis_apply, etf_radius
from etflayers.kernels.polar import FrameState, SpectralState
from etflayers.linalg import Eigenbasis, Spectrum, pair_sums, spectral
from etflayers.precision import smallest_divisor

__all__ = ["FoundState", "SpectralState", "rank_cutoff", "spectral_state", "state_of"]


@dataclass(frozen=True)
class FoundState:
    """A frame that was found alone; what else is asked comes from :func:`state_of`, which also checks it.

    Attributes:
        frame: W, ``(..., K, d)``, in the dtype to compute in.
        linear: M, ``(..., K, d)``.
        precision: of the data.
        tolerance: largest relative error in the optimality conditions of W.
    """

    frame: Tensor
    linear: Tensor
    precision: torch.dtype
    tolerance: float

    @cached_property
    def _spectral(self) -> SpectralState:
        return state_of(self.frame, self.linear, precision=self.precision, tolerance=self.tolerance)

    @property
    def dtype(self) -> torch.dtype:
        """That of the frame."""
        return self.frame.dtype

    @property
    def spectrum(self) -> Spectrum:
        """The eigenbasis of M_c W'."""
        return self._spectral.spectrum

    def solve_sylvester(self, rhs: Tensor, *, skew: bool = False) -> Tensor:
        """X with T X + X T = S, zero between absent directions."""
        return self._spectral.solve_sylvester(rhs)

    def pseudo_inverse(self, rows: Tensor) -> Tensor:
        """c^2 T^+ times rows ``(..., K, m)``."""
        return self._spectral.pseudo_inverse(rows)

    def tensors(self) -> tuple[Tensor, ...]:
        """Those of a :class:`SpectralState`."""
        return self._spectral.tensors()

    @property
    def form(self) -> Callable[..., FrameState]:
        """That of a :class:`SpectralState`."""
        return self._spectral.form


def state_of(
    frame: Tensor, linear: Tensor, *, precision: torch.dtype | None = None, tolerance: float = 1e-5
) -> SpectralState:
    """The state of a frame that was found without one, by one eigenproblem; checks that it is optimal.

    Args:
        frame: W, ``(..., K, d)``, in the dtype to compute in.
        linear: M, ``(..., K, d)``.
        precision: of the data, where M has been computed from them in a wider dtype; ``None``: that of M.
        tolerance: largest relative deviation from WW' = c^2 C and from a symmetric, positive M_c W'.

    Returns:
        The state, with ``frame`` as it is.

    Raises:
        ConvergenceError: W is not the simplex ETF that maximizes <W, M>.

    >>> linear = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    >>> state_of(torch.tensor([[0.6, 0.8], [-0.6, -0.8]]), linear).spectrum.reciprocals
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
    return spectral_state(frame, centered_basis_adjoint(left), radius * values, precision or linear.dtype)


def _require_optimal(optimal: Tensor, tolerance: float) -> None:
    require_values(
        optimal.all(),
        f"the solver returned a frame that is not the nearest simplex ETF within tolerance={tolerance:g}: "
        "give it more steps or a stricter stopping rule, or use solver=SVD() or the default",
        ConvergenceError,
    )


def spectral_state(frame: Tensor, basis: Tensor, values: Tensor, precision: torch.dtype) -> SpectralState:
    """The state for eigenvectors ``basis`` and eigenvalues tau of T, for data of this ``precision``.

    Any rank. Absent directions are divided by 1 and then zeroed, so that no division by zero is ever
    differentiated.
    """
    num_classes, in_features = frame.shape[-2:]
    cutoff = rank_cutoff(values, in_features, precision)
    present = values > cutoff
    # The mask first: a Python number times a mask would be rounded to float32.
    inverse = spectral(basis, present / torch.where(present, values, 1) * num_classes / (num_classes - 1))
    sums = pair_sums(values)
    pairs = sums > cutoff.unsqueeze(-1)
    return SpectralState(frame, inverse, Eigenbasis(basis, pairs / torch.where(pairs, sums, 1)))


def rank_cutoff(singular_values: Tensor, in_features: int, precision: torch.dtype) -> Tensor:
    """The singular value below which a direction counts as absent from data of this ``precision``.

    Relative: rounding of the data, and of the factorization. Absolute: so small that dividing by it
    overflows.

    Args:
        singular_values: ``(..., n)`` in the precision of the factorization.
        in_features: d.
        precision: of the data.

    Returns:
        ``(..., 1)``.
    """
    rounding = 8 * torch.finfo(precision).eps + in_features * torch.finfo(singular_values.dtype).eps
    return (rounding * singular_values.amax(-1, keepdim=True)).clamp_min(smallest_divisor(precision))
